"""The commands on data alone: inspect, check, convert, split."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from slidevlm.app.cohorts import is_bag, open_cohort, open_path
from slidevlm.app.page import plotly_source
from slidevlm.app.trained import new_tokenizer
from slidevlm.app.weights import start_of
from slidevlm.config import Config, validate_data
from slidevlm.data import check as checking
from slidevlm.data.cases import Case, CaseStore
from slidevlm.data.check import CheckReport, Labelled, Texts
from slidevlm.data.convert import DTYPES, Converted, convert
from slidevlm.data.formats.hdf5_cases import Hdf5Cases, attribute_names
from slidevlm.data.formats.hdf5_target import Layout
from slidevlm.data.inspect import Inspection, inspect_file, inspect_store
from slidevlm.data.make_split import NO_CLASS, Division, divide, tcga_sites
from slidevlm.data.reports import read_table, read_text_file, read_utf8
from slidevlm.data.sampling import TrainBatches
from slidevlm.data.scan import facts_of
from slidevlm.data.splits import report_of, write_identifiers
from slidevlm.data.tokenizer import TextTokenizer, Tokenizer
from slidevlm.errors import ConfigError, DataError
from slidevlm.eval.prompts import Labels, read_classes, read_labels, read_prompts
from slidevlm.eval.survival import read_survival
from slidevlm.eval.tasks.few_shot import read_few_shot
from slidevlm.models import from_dict, zoo
from slidevlm.report.check_page import page, terminal
from slidevlm.report.inspection import terminal as inspection_text
from slidevlm.report.plain import table
from slidevlm.run import Bar, configure_logging, working, write_text

SPLITS = ("train", "val", "test")
log = logging.getLogger("slidevlm")


# -- inspect ---------------------------------------------------------------------------------


def inspect_path(path: Path) -> Inspection:
    """What is at `path`: a file of any known format, or a folder of them.

    Raises:
        DataError: nothing is there, or nothing that is known.
    """
    if not path.exists():
        raise DataError(f"no file or folder {path} (looked in {Path.cwd()})")
    if path.is_dir() and not is_bag(path):
        return inspect_store(open_path(path, None, None), path)
    return inspect_file(path)


def inspect(path: Path, *, as_json: bool) -> None:
    """Print what is at `path`."""
    configure_logging(debug=False, main=True)
    with working("looking into files"):
        found = inspect_path(path)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
    else:
        print(inspection_text(found))


# -- check -----------------------------------------------------------------------------------


def check(config: Config, output: Path | None, *, as_json: bool = False) -> bool:
    """Print the report on the cohort that `config` would train on; whether it has no error.

    Args:
        as_json: print what check.json has instead.
        output: folder that gets check.json and check.html, made where it is missing.

    Raises:
        ConfigError: arguments that cannot work.
    """
    validate_data(config)
    configure_logging(debug=config.logging.debug, main=True)
    plotly = None if output is None else plotly_source()
    if output is not None:
        _make_folder(output)
    report = check_report(config)
    text = json.dumps(report.to_dict(), indent=1, ensure_ascii=False)
    if output is not None and plotly is not None:
        write_text(output / "check.json", text + "\n")
        write_text(output / "check.html", page(report, plotly))
    print(text if as_json else terminal(report))
    if output is not None and not as_json:
        print(f"wrote {output / 'check.json'} and {output / 'check.html'}")
    return report.count("error") == 0


def check_report(config: Config) -> CheckReport:
    """Everything that is to be said; what cannot be read is a finding, not an error."""
    report, data = CheckReport(), config.data
    model = _model(config)
    texts = None
    if data.text_data_file is not None:
        with _finding(report, "reports"):
            texts = read_text_file(Path(data.text_data_file))
    labelled = _labelled(config, report)
    splits = {"train": data.train_split} if data.train_split else {}
    splits |= {Path(path).stem: path for path in data.val_split or ()}
    splits |= {"test": data.test_split} if data.test_split else {}
    store = None
    with _finding(report, "data"):
        store = open_cohort(config)
    if store is None:
        return report
    bar = Bar("reading specimens", len(store.cases), shown=True)
    try:
        checking.check(
            report,
            store,
            {name: Path(path) for name, path in splits.items()},
            texts,
            Texts(model.tokenizer, model.context),
            labelled,
            cutoff=data.image_features_cutoff,
            allow_patient_overlap=data.allow_patient_overlap,
            workers=data.workers,
            progress=lambda done, of: bar.update(done),
        )
    finally:
        bar.close()
    _against_model(report, model)
    _against_batches(report, config)
    return report


@dataclass(frozen=True)
class _Model:
    """What the model asks of the data: the one to be trained, or the one gone on from."""

    tokenizer: Callable[[Sequence[str]], TextTokenizer]
    context: int
    tile_width: int | None  # None: any
    units: tuple[str, ...] | None = None  # of positions; None: any


def _model(config: Config) -> _Model:
    logs, name = config.logs, config.logging.name
    saved = start_of(config, None if logs is None or name is None else logs / name).model
    if saved is not None:
        tokenizer = Tokenizer.from_json(saved.tokenizer)
        model = from_dict(saved.config, "the checkpoint's model")
        units = () if saved.position_unit is None else (saved.position_unit,)
        return _Model(lambda reports: tokenizer, model.text.context_length, model.tile_width, units)
    model = zoo.load(config.model.model)
    return _Model(
        lambda reports: new_tokenizer(model.text, reports),
        model.text.context_length,
        model.tile_width,
    )


@contextmanager
def _finding(report: CheckReport, topic: str) -> Iterator[None]:
    """A DataError becomes a finding."""
    try:
        yield
    except DataError as error:
        report.add("error", topic, str(error))


def _labelled(config: Config, report: CheckReport) -> list[Labelled]:
    """Label files with what prompts they have; all files of evaluation are read."""
    evaluation = config.evaluation
    pairs: Sequence[tuple[str | None, str]] = config.prompt_pairs or [
        (None, file) for file in evaluation.zsc_specimen_class_mapping or ()
    ]
    known: list[Labels] = []
    found: list[Labelled] = []
    for prompt_file, label_file in pairs:
        with _finding(report, "labels"):
            prompts = None if prompt_file is None else read_prompts(Path(prompt_file))
            known.append(labels := read_labels(Path(label_file)))
            by_class: dict[str, Sequence[str]] | None = None
            if prompts is not None:
                by_class = dict(zip(prompts.classes, prompts.texts, strict=True))
            found.append(Labelled(labels.name, labels.classes, by_class))
    if len(known) == len(pairs):  # else what examples belong to is not known
        for file in evaluation.few_shot_examples or ():
            with _finding(report, "few-shot examples"):
                read_few_shot(Path(file), known)
    if evaluation.survival_table is not None:
        with _finding(report, "survival"):
            read_survival(Path(evaluation.survival_table))
    return found


def _against_model(report: CheckReport, model: _Model) -> None:
    if report.cohort is None:
        return
    strange = [str(width) for width in report.cohort.widths if width != model.tile_width]
    if model.tile_width is not None and strange:
        report.add(
            "error",
            "feature width",
            f"the model reads tiles of width {model.tile_width}, this data has "
            f"{', '.join(strange)}",
        )
    if model.units is not None and report.cohort.units != model.units:
        wanted, found = (", ".join(u) or "none" for u in (model.units, report.cohort.units))
        report.add(
            "error",
            "unit of positions",
            f"the model was trained on positions in {wanted}, this data has {found}",
        )


def _against_batches(report: CheckReport, config: Config) -> None:
    for row in report.splits:
        if row.name == "train" and row.specimens and not config.evaluation.test:
            wanted = config.data.num_samples or row.specimens
            try:
                TrainBatches(
                    min(wanted, row.specimens),
                    config.data.batch_size,
                    config.evaluation.seed,
                    accum_freq=config.optim.accum_freq,
                )
            except ConfigError as error:
                report.add("error", "batches", str(error))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder}: {error}") from error


# -- convert ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversion:
    """What is converted, and into what."""

    source: Path
    target: Path
    hdf5_feature_attribute: str | None = None  # of the source
    slide_table: Path | None = None
    text_data_file: Path | None = None
    feature_attribute: str | None = None  # in the target; None: as the source or encoder says
    text_attribute: str = "report"  # in the target, of the texts from text_data_file
    dtype: str = "float16"
    chunk_rows: int | None = None
    mpp: float | None = None  # micrometres a level-0 pixel, into which positions are converted
    workers: int = 2


def convert_path(wanted: Conversion, *, as_json: bool = False) -> None:
    """Convert, and say what came of it.

    Raises:
        ConfigError, DataError: see `convert`.
    """
    configure_logging(debug=False, main=True)
    if wanted.dtype not in DTYPES:
        raise ConfigError(f"--dtype {wanted.dtype!r} is not one of {', '.join(DTYPES)}")
    store = open_path(wanted.source, wanted.hdf5_feature_attribute, wanted.slide_table)
    file = wanted.text_data_file
    read = None if file is None else read_text_file(file)

    def texts_of(case: Case) -> Mapping[str, str]:
        kept = dict(store.texts(case)) if isinstance(store, Hdf5Cases) else {}
        if read is not None and (text := report_of(case, store, read)):
            kept[wanted.text_attribute] = text
        return kept

    layout = Layout(_feature_name(wanted, store), wanted.dtype, wanted.chunk_rows)
    bars = _Bars()
    try:
        done = convert(
            store,
            wanted.target,
            layout,
            texts_of,
            workers=wanted.workers,
            settings=_of_sources(wanted),
            progress=bars.show,
            mpp=wanted.mpp,
        )
    finally:
        bars.close()
    for names, what in (
        (done.without_features, "have no features and are left out"),
        (done.not_finite, "have NaN or infinite features, kept as they are"),
    ):
        if names:
            log.warning("%d specimens %s: %s", len(names), what, ", ".join(names[:10]))
    if as_json:
        content = {
            "target": str(wanted.target),
            "feature_attribute": layout.feature_attribute,
            "specimens": done.specimens,
            "resumed": done.resumed,
            "tiles": done.tiles,
            "bytes": done.size,
            "without_features": list(done.without_features),
            "not_finite": list(done.not_finite),
        }
        print(json.dumps(content, indent=1, ensure_ascii=False))
        return
    print(_told(wanted, layout, done))


def _told(wanted: Conversion, layout: Layout, done: Converted) -> str:
    """What was written, and what a training on it is given."""
    resumed = f" ({done.resumed} of them before)" if done.resumed else ""
    texts = attribute_names(wanted.target)[1]
    text = wanted.text_attribute if wanted.text_attribute in texts else next(iter(texts), None)
    return (
        f"wrote {wanted.target}: {done.specimens} specimens{resumed}, {done.tiles} tiles, "
        f"{done.size / 1e6:.1f} MB; use it with\n"
        f"  --hdf5_filename {wanted.target} --hdf5_feature_attribute {layout.feature_attribute} "
        + ("--text-data-file REPORTS" if text is None else f"--hdf5_text_attribute {text}")
    )


def _of_sources(wanted: Conversion) -> str:
    """What beside the layout decides what is in the target."""
    files = [file for file in (wanted.text_data_file, wanted.slide_table) if file is not None]
    stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return repr((replace(wanted, workers=0), stamps))


def _feature_name(wanted: Conversion, store: CaseStore) -> str:
    """The name in the target: what is asked for, the source's, the encoder's, or "features"."""
    if wanted.feature_attribute is not None:
        return wanted.feature_attribute
    if isinstance(store, Hdf5Cases):
        return store.feature_attribute
    for case in store.cases:
        if store.has_features(case):
            return (facts_of(store, case).encoder or "features").replace("/", "_")
    return "features"


class _Bars:
    """One bar after the other, as the work goes through its parts."""

    def __init__(self) -> None:
        self._title = ""
        self._bar: Bar | None = None

    def show(self, title: str, done: int, of: int) -> None:
        """`done` of `of` of the part named `title`."""
        if title != self._title or self._bar is None:
            self.close()
            self._title, self._bar = title, Bar(title, of, shown=True)
        self._bar.update(done)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


# -- split -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dividing:
    """How a cohort is divided."""

    source: Path
    folder: Path
    hdf5_feature_attribute: str | None = None
    slide_table: Path | None = None
    labels: Path | None = None
    fractions: tuple[float, ...] = (0.7, 0.15, 0.15)
    by_site: bool = False
    site_table: Path | None = None
    site_column: str = "site"
    seed: int = 0


def split_path(wanted: Dividing, *, as_json: bool = False) -> None:
    """Write train.txt, val.txt and test.txt, and say what balance was reached.

    Raises:
        ConfigError: one of the files exists, fractions that are none.
        DataError: data, labels or sites that cannot be used.
    """
    configure_logging(debug=False, main=True)
    names = SPLITS[: max(2, len(wanted.fractions))]
    files = [wanted.folder / f"{name}.txt" for name in names]
    there = [str(file) for file in files if file.exists()]
    if there:
        raise ConfigError(f"{', '.join(there)} exist(s); choose another folder or remove them")
    with working("listing specimens"):
        store = open_path(wanted.source, wanted.hdf5_feature_attribute, wanted.slide_table)
        cases = [case for case in store.cases if store.has_features(case)]
    if len(cases) < len(store.cases):
        log.warning(
            "%d of %d specimens have no features and are left out",
            len(store.cases) - len(cases),
            len(store.cases),
        )
    with working("dividing"):
        division = divide(
            cases,
            names,
            wanted.fractions,
            classes=None if wanted.labels is None else read_classes(wanted.labels),
            sites=_sites(wanted, cases),
            seed=wanted.seed,
        )
    _make_folder(wanted.folder)
    for file, specimens in zip(files, division.specimens, strict=True):
        write_text(file, write_identifiers(specimens))
    if as_json:
        print(json.dumps(_balance_values(division, files), indent=1, ensure_ascii=False))
        return
    print(_balance(division, "sites" if wanted.by_site or wanted.site_table else "patients"))
    print(f"wrote {', '.join(map(str, files))}")


def _balance_values(division: Division, files: Sequence[Path]) -> dict[str, object]:
    rows = zip(division.names, files, division.counts, division.groups, strict=True)
    return {
        name: {
            "file": str(file),
            "specimens": int(counts.sum()),
            "groups": int(groups),
            "classes": dict(zip(map(str, division.classes), counts.tolist(), strict=True)),
        }
        for name, file, counts, groups in rows
    }


def _sites(wanted: Dividing, cases: Sequence[Case]) -> dict[str, str] | None:
    """patient -> site, or None where patients are the groups."""
    if wanted.site_table is not None:
        return _site_table(wanted.site_table, wanted.site_column, cases)
    return tcga_sites(cases) if wanted.by_site else None


def _site_table(path: Path, column: str, cases: Sequence[Case]) -> dict[str, str]:
    """patient -> site from a table of patients or specimens."""
    names, rows = read_table(read_utf8(path), path)
    keys = [
        n for n in ("patient", "patient_id", "specimen", "specimen_id", "case_id") if n in names
    ]
    if column.strip().lower() not in names or not keys:
        raise DataError(
            f"{path} has the columns {', '.join(names)}; needed are {column} (--site-column) and "
            "one of patient, patient_id, specimen, specimen_id, case_id"
        )
    patients = {case.patient: case.patient for case in cases}
    patients |= {case.specimen: case.patient for case in cases}
    sites: dict[str, str] = {}
    for row in rows:
        site = row[column.strip().lower()].strip()
        patient = next((patients[row[k].strip()] for k in keys if row[k].strip() in patients), None)
        if patient is None or not site:
            continue
        if sites.setdefault(patient, site) != site:
            raise DataError(
                f"{path}: patient {patient!r} is of the sites {sites[patient]!r} and {site!r}; a "
                "patient is not divided: give one of them"
            )
    return sites


def _balance(division: Division, groups: str) -> str:
    """Specimens and classes of each split."""
    total = division.counts.sum()
    rows: list[list[object]] = [
        [
            name,
            int(division.counts[i].sum()),
            f"{division.counts[i].sum() / total:.1%}",
            division.groups[i],
        ]
        for i, name in enumerate(division.names)
    ]
    parts = [table(("split", "specimens", "of all", groups), rows)]
    if division.classes != (NO_CLASS,):
        shares = division.counts / division.counts.sum(axis=1, keepdims=True)
        body = [
            [kind, *(f"{n} ({share:.1%})" for n, share in zip(counts, part, strict=True))]
            for kind, counts, part in zip(
                division.classes, division.counts.T, shares.T, strict=True
            )
        ]
        parts.append(table(("class", *division.names), body))
    return "\n\n".join(parts)
