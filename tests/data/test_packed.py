from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap

import pytest

from slidevlm.data.cases import Case
from slidevlm.data.packed import Cases, Texts


def test_texts_come_back():
    texts = ["", "Liver.", "z\u00e9\u2603\U0001f600", "", "half \ud800"]
    packed = pickle.loads(pickle.dumps(Texts(texts)))
    assert list(packed) == texts and len(packed) == 5
    assert [packed[i] for i in (0, 2, 4, -1, -5)] == [texts[i] for i in (0, 2, 4, -1, -5)]
    for index in (5, -6):
        with pytest.raises(IndexError):
            packed[index]
    assert list(Texts([])) == []


def test_cases_come_back():
    cases = [Case("s", "p", "/a"), Case("p/t", "p", "folder \udcff/b.h5")]
    packed = Cases(cases)
    assert list(packed) == cases and len(packed) == 2
    assert packed[1] == packed[-1] == cases[1]


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="Linux tells it")
def test_a_forked_process_that_reads_the_index_has_no_copy_of_it(write):
    """Of 20,000 specimens whose names and reports take 14 MB as Python objects."""
    script = """
        import os, sys
        from slidevlm.data.cases import Case
        from slidevlm.data.dataset import BagDataset
        from slidevlm.data.formats.hdf5_cases import Hdf5Cases
        from slidevlm.data.tokenizer import Tokenizer

        def own():
            lines = open("/proc/self/smaps_rollup").read().splitlines()
            return next(int(line.split()[1]) for line in lines if "Private_Dirty" in line)

        def made(i):
            return Case(f"specimen {i}", f"patient {i}", f"/patients/{i}"), f"report {i} " * 30

        cases, reports = zip(*map(made, range(20_000)))
        store = Hdf5Cases(sys.argv[1], "uni")
        data = BagDataset(store, cases, reports, Tokenizer.train(["a"], 300), 9, 9, 0, True)
        if os.fork():
            sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
        before = own()
        for i in range(len(data)):
            data.cases[i], data.reports[i]
        print(own() - before)
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(write([1]))],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert int(found.stdout) < 2000  # kB
