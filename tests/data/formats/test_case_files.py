"""Case files with any names and contents: what is written is read, anything else is an error."""

from __future__ import annotations

import json

import h5py
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from slidevlm.data.formats.case_folders import CaseFolders
from slidevlm.data.formats.hdf5_cases import CaseWriter, Hdf5Cases
from slidevlm.errors import DataError

MANY = settings(max_examples=100, deadline=None)

# HDF5 keeps text as UTF-8 that ends at the first NUL; "/" divides paths.
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=20)
names = texts.filter(lambda name: name not in ("", ".", "..") and "/" not in name)


@MANY
@given(cases=st.dictionaries(st.tuples(names, names), st.tuples(texts, st.integers(0, 4)),
                             min_size=1, max_size=5))  # fmt: skip
def test_what_is_written_is_read(tmp_path_factory, cases):
    path = tmp_path_factory.getbasetemp() / "any.h5"
    with CaseWriter(path, "uni", attributes={"unit": "um"}) as writer:
        for (patient, specimen), (report, rows) in cases.items():
            writer.add(patient, specimen, np.full((rows, 2), rows, "f2"), report)
    store = Hdf5Cases(path, "uni", "report")
    assert [case.patient for case in store.cases] == [patient for patient, _ in cases]
    assert len({case.specimen for case in store.cases}) == len(cases)
    for case, ((patient, specimen), (report, rows)) in zip(store.cases, cases.items(), strict=True):
        assert case.specimen in (specimen, f"{patient}/{specimen}")
        assert store.text(case) == report and store.length(case) == rows
        assert store.read(case, None).features.tolist() == [[rows, rows]] * rows
    store.close()


@MANY
@given(
    index=st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
            st.one_of(
                st.sampled_from(["/patients/p/a", "patients/p/a/", "/patients/p/b", "/patients/p"]),
                st.text("/patiensdcbs.", max_size=20),
            ),
        ),
        max_size=4,
    )
)
def test_any_case_index_is_a_cohort_or_an_error(tmp_path_factory, index):
    path = tmp_path_factory.getbasetemp() / "index.h5"
    with h5py.File(path, "w") as file:
        file["patients/p/a/uni/features"] = np.ones((2, 3), "f2")
        text = h5py.string_dtype()
        for column, name in enumerate(("case_ids", "case_paths")):
            values = np.array([row[column] for row in index], object)
            file.create_dataset(f"case-index/{name}", data=values, dtype=text)
    try:
        store = Hdf5Cases(path, "uni")
        lengths = [store.length(case) for case in store.cases if store.has_features(case)]
    except DataError as error:
        assert "index.h5" in str(error)
    else:
        assert lengths and set(lengths) == {2}
        store.close()


entry = st.fixed_dictionaries(
    {}, optional={"patient": st.one_of(texts, st.integers()), "specimen": texts, "size": st.none()}
)
line = st.one_of(
    entry.map(json.dumps),
    st.sampled_from(["[]", '["a b.ndpi"]', "'1.pth'", "'../1.pth'", "", "1.pth", "null"]),
    st.text(max_size=20),
)


@settings(max_examples=300, deadline=None)
@given(lines=st.lists(line, max_size=9), end=st.sampled_from(["\n", "\r\n"]))
def test_any_folder_index_is_a_cohort_or_an_error(tmp_path_factory, lines, end):
    root = tmp_path_factory.getbasetemp() / "cohort"
    (root / "data_0").mkdir(parents=True, exist_ok=True)
    content = end.join(lines).encode("utf-8", "surrogatepass")
    (root / "data_0/feature_information.txt").write_bytes(content)
    try:
        store = CaseFolders(root)
    except DataError as error:
        assert "cohort" in str(error)
    else:
        assert all(not store.has_features(case) for case in store.cases)
        assert all(case.location.endswith(".pth") and ".." not in case.location.split("/")
                   for case in store.cases)  # fmt: skip
