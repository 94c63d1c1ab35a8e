"""The commands on reports: caption writes them, score compares them."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from slidevlm.app.cohorts import open_path
from slidevlm.app.devices import choose_device
from slidevlm.app.outputs import model_hash
from slidevlm.app.pretrained import read_pretrained
from slidevlm.app.trained import Trained, restore, same_data
from slidevlm.config import Config, with_values
from slidevlm.data.cases import Case, CaseStore
from slidevlm.data.dataset import BadSpecimens, BagDataset, StopAtBad, make_loader
from slidevlm.data.reports import ID_COLUMNS, read_text_file, read_utf8
from slidevlm.data.sampling import EvalBatches
from slidevlm.data.splits import find, read_identifiers
from slidevlm.errors import CheckpointError, ConfigError, DataError
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.scores import Score
from slidevlm.eval.text_metrics.clinical import read_extractor
from slidevlm.eval.text_metrics.embedders import embedder
from slidevlm.eval.text_metrics.meteor_data import MeteorData, read_data
from slidevlm.eval.text_metrics.scoring import Scoring
from slidevlm.models.generate import Decoding, draft
from slidevlm.precision import Precision, resolve
from slidevlm.report.tables import score_table
from slidevlm.run import Bar, configure_logging, write_text

log = logging.getLogger("slidevlm")

# -- caption ---------------------------------------------------------------------------------

FORMS = (".json", ".csv", ".txt")


@dataclass(frozen=True)
class Captioning:
    """What `slidevlm caption` was asked for."""

    model: Path  # a run folder or a checkpoint file
    source: Path
    output: Path | None  # None: a line of JSON a report, to the terminal
    split: Path | None
    hdf5_feature_attribute: str | None
    slide_table: Path | None
    image_features_cutoff: int
    batch_size: int
    workers: int
    device: str | None
    precision: str
    prompt: str
    skip_bad: bool
    decoding: dict[str, Any]  # of `Decoding`, without the ids of tokens


def caption(asked: Captioning) -> int:
    """Write a report of every specimen; the number written.

    The reports go to a file beside the output as they are ready. Interrupted, the same command
    goes on where it was.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    configure_logging(debug=False, main=True)
    if asked.output is not None:
        _check_output(asked.output)
    Decoding(1, 2, 0, **asked.decoding)  # wrong settings are told before a model is read
    trained = _trained(asked.model)
    tokenizer = trained.tokenizer
    decoding = Decoding(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, **asked.decoding)
    store = open_path(asked.source, asked.hdf5_feature_attribute, asked.slide_table)
    cases = _cases(asked, store)
    about = {
        "model": model_hash(trained.model),
        "decoding": {**asked.decoding, "prompt": asked.prompt},
        "tiles": asked.image_features_cutoff,
    }
    if asked.output is None:
        written = 0
        for record in _reports(asked, trained, store, cases, decoding):
            print(json.dumps({**record, **about}, ensure_ascii=False), flush=True)
            written += 1
        return written
    partial = _Partial(asked.output, {**about, "source": str(asked.source.resolve())})
    todo = [case for case in cases if case.specimen not in partial.records]
    if len(todo) < len(cases):
        log.info("%d of %d reports are there already", len(cases) - len(todo), len(cases))
    with partial:
        for record in _reports(asked, trained, store, todo, decoding):
            partial.add(record)
    records = [partial.records[c.specimen] for c in cases if c.specimen in partial.records]
    write_text(asked.output, _formatted(records, about, asked.output.suffix.lower()))
    partial.path.unlink()
    print(f"wrote {asked.output}: {len(records)} reports")
    return len(records)


def _trained(path: Path) -> Trained:
    state = read_pretrained(str(path)).state
    if state is None:
        raise CheckpointError(
            f"{path} has weights, but no configuration and tokenizer of slidevlm beside them; give "
            "the folder of a run or one of its checkpoints"
        )
    return restore(state)


def _check_output(output: Path) -> None:
    if output.suffix.lower() not in FORMS:
        raise ConfigError(
            f"--output {output}: the ending tells the form, one of {', '.join(FORMS)}; "
            "- writes lines of JSON to the terminal"
        )
    if output.exists():
        raise ConfigError(f"--output {output} exists; choose another file or remove it")


def _cases(asked: Captioning, store: CaseStore) -> list[Case]:
    if asked.split is None:
        cases = [case for case in store.cases if store.has_features(case)]
    else:
        found = find(read_identifiers(asked.split), store)
        if found.missing:
            log.warning(
                "%d names of %s have no features and are left out: %s",
                len(found.missing),
                asked.split,
                ", ".join(found.missing[:10]),
            )
        cases = list(found.cases)
    if not cases:
        raise DataError(f"{asked.source}: no specimen with features to write a report of")
    return cases


def _reports(
    asked: Captioning,
    trained: Trained,
    store: CaseStore,
    cases: Sequence[Case],
    decoding: Decoding,
) -> Iterator[dict[str, Any]]:
    """The records of the specimens, in batches, as they are ready."""
    if not cases:
        return
    tokenizer, precision = trained.tokenizer, _precision(asked)
    trained.model.to(precision.device)
    prompt = tokenizer.tokens(asked.prompt) if asked.prompt else []
    dataset = BagDataset(
        store,
        cases,
        [""] * len(cases),
        tokenizer,
        max_tokens=2,
        cutoff=asked.image_features_cutoff,
        seed=decoding.seed,
        training=False,
    )
    batches = EvalBatches(len(cases), asked.batch_size, 0, 1)
    bad = BadSpecimens() if asked.skip_bad else StopAtBad()
    loader = make_loader(dataset, batches, min(asked.workers, len(batches)), bad=bad)
    bar, done = Bar("writing reports", len(cases), shown=True), 0
    try:
        for cpu_batch in loader:
            if not len(cpu_batch):
                continue
            batch = cpu_batch.to(precision.device)
            same_data(trained, batch.bags.features.shape[1], batch.bags.unit)
            with torch.inference_mode(), precision.autocast():
                found = draft(trained.model, batch.bags, batch.specimen_ids, decoding, prompt)
            for specimen, drafts in zip(batch.specimen_ids, found, strict=True):
                texts = [
                    {
                        "report": tokenizer.decode([*prompt, *d.tokens]),
                        "score": round(d.score, 4) if math.isfinite(d.score) else None,
                        "ended": d.ended,
                    }
                    for d in drafts
                ]
                others = {"alternatives": texts[1:]} if decoding.best > 1 else {}
                yield {"id": specimen, **texts[0], **others}
            done += len(batch)
            bar.update(done)
    finally:
        bar.close()


def _precision(asked: Captioning) -> Precision:
    given = {} if asked.device is None else {"device": asked.device}
    return resolve(asked.precision, choose_device(with_values(Config(), given)))


class _Partial:
    """Reports so far, a line of JSON each, under a line that says what they come from."""

    def __init__(self, output: Path, about: dict[str, Any]) -> None:
        self.path = output.with_name(output.name + ".partial.jsonl")
        self.records: dict[str, dict[str, Any]] = {}
        self._about = about
        self._file: IO[str] | None = None
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        lines = read_utf8(self.path).split("\n")
        if lines[0] != json.dumps(self._about):
            raise ConfigError(
                f"{self.path} was written by another model, from other data or with other "
                "settings; remove it or choose another --output"
            )
        for line in lines[1:]:
            try:
                record = json.loads(line)
            except ValueError:  # empty, or cut short by a kill
                continue
            self.records[record["id"]] = record

    def __enter__(self) -> _Partial:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [json.dumps(r, ensure_ascii=False) for r in self.records.values()]
        write_text(self.path, "\n".join([json.dumps(self._about), *kept]) + "\n")
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record, on the disk too."""
        assert self._file is not None
        self.records[record["id"]] = record
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()


def _formatted(records: Sequence[dict[str, Any]], about: dict[str, Any], ending: str) -> str:
    if ending == ".json":
        return json.dumps([{**r, **about} for r in records], indent=1, ensure_ascii=False) + "\n"
    origin = f"model {about['model']}, decoding {json.dumps(about['decoding'])}"
    if ending == ".txt":
        texts = [f"{r['id']}\t{' '.join(r['report'].split())}" for r in records]
        return "\n".join([f"# {origin}", *texts]) + "\n"
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    # A reader of texts takes the first report of a name, so further ones have another.
    best = any("alternatives" in r for r in records)
    writer.writerow(["id", "report", "score", "ended", *(["alternatives"] if best else []),
                     "model", "decoding"])  # fmt: skip
    for r in records:
        others = [json.dumps(r["alternatives"], ensure_ascii=False)] if best else []
        writer.writerow([r["id"], r["report"], r["score"], r["ended"], *others,
                         about["model"], json.dumps(about["decoding"])])  # fmt: skip
    return table.getvalue()


# -- score -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparing:
    """What `slidevlm score` was asked for."""

    generated: Path
    references: Path | None  # None: they stand beside the generated ones
    bootstrap: Bootstrap
    clinical: Path | None
    meteor_data: Path | None
    embedder: str | None
    only_common: bool
    form: str
    output: Path | None


def score(asked: Comparing) -> dict[str, float]:
    """Score generated reports, print the table, perhaps write it as JSON.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    configure_logging(debug=False, main=True)
    if asked.output is not None and asked.output.exists():
        raise ConfigError(f"--output {asked.output} exists; choose another file or remove it")
    generated, references = _texts(asked)
    names = _matched(generated, references, asked)
    ours, theirs = [generated[n] for n in names], [references[n] for n in names]
    scoring = Scoring(
        extractor=read_extractor(asked.clinical),
        meteor=MeteorData() if asked.meteor_data is None else read_data(asked.meteor_data),
        embed=None if asked.embedder is None else embedder(asked.embedder, theirs),
    )
    counted = scoring.count(ours, theirs)
    values = counted.scores()
    drawn: dict[str, np.ndarray] = {}
    if asked.bootstrap:
        drawn = asked.bootstrap.values(names, counted.values).values
    rows = [_row(name, value, drawn, asked.bootstrap, len(names)) for name, value in values.items()]
    print(score_table(rows, asked.form, shutil.get_terminal_size().columns))
    if asked.output is not None:
        write_text(asked.output, _as_json(asked, rows))
        print(f"wrote {asked.output}")
    return values


def _row(
    name: str, value: float, drawn: dict[str, np.ndarray], bootstrap: Bootstrap, n: int
) -> Score:
    lo, hi = bootstrap.interval(drawn[name]) if name in drawn else (math.nan, math.nan)
    known = not math.isnan(lo)
    return Score("reports", name, value, lo if known else None, hi if known else None, n)


def _as_json(asked: Comparing, rows: Sequence[Score]) -> str:
    settings = {
        "generated": str(asked.generated),
        "references": str(asked.references or asked.generated),
        "bootstrap": asdict(asked.bootstrap),
        "clinical": None if asked.clinical is None else str(asked.clinical),
        "meteor_data": None if asked.meteor_data is None else str(asked.meteor_data),
        "embedder": asked.embedder,
    }
    scores = {
        r.metric: {"value": None if math.isnan(r.value) else r.value, "lo": r.lo, "hi": r.hi}
        for r in rows
    }
    content = {"about": settings, "reports": rows[0].n if rows else 0, "scores": scores}
    return json.dumps(content, indent=1) + "\n"


def _texts(asked: Comparing) -> tuple[dict[str, str], dict[str, str]]:
    """Generated and true texts by name."""
    if asked.references is not None:
        return read_text_file(asked.generated), read_text_file(asked.references)
    path = asked.generated
    try:
        rows = json.loads(read_utf8(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); give a second file of references") from None
    found: tuple[dict[str, str], dict[str, str]] = {}, {}
    for row in rows if isinstance(rows, list) else [None]:
        name, ours, theirs = _beside(row)
        if name is None or not isinstance(ours, str) or not isinstance(theirs, str):
            raise DataError(
                f"{path}: alone it must be a list of {{id, generated, report}}, such as the "
                "captions_test.json of a run; else give a second file of references"
            )
        found[0][name], found[1][name] = ours, theirs
    return found


def _beside(row: Any) -> tuple[str | None, Any, Any]:
    """Name, generated and true text of an entry that has both."""
    if not isinstance(row, dict):
        return None, None, None
    name = next((str(row[column]) for column in ID_COLUMNS if column in row), None)
    if name is not None and "split" in row:
        name = f"{row['split']}/{name}"
    return name, row.get("generated"), row.get("report")


def _matched(
    generated: dict[str, str], references: dict[str, str], asked: Comparing
) -> tuple[str, ...]:
    common = tuple(name for name in references if name in generated)
    if not common:
        raise DataError(
            f"{asked.generated} and {asked.references} have no name in common, such as "
            f"{next(iter(generated))!r} and {next(iter(references))!r}; the same specimens must "
            "have the same names"
        )
    lacking = [name for name in references if name not in generated]
    if lacking and not asked.only_common:
        raise DataError(
            f"{asked.generated} lacks {len(lacking)} of the {len(references)} specimens of "
            f"{asked.references}: {', '.join(lacking[:5])}; add them, or score those that are "
            "there with --only-common"
        )
    more = len(generated) - len(common)
    for number, what in ((len(lacking), "references"), (more, "generated reports")):
        if number:
            log.warning("%d %s have no counterpart and are left out", number, what)
    return common
