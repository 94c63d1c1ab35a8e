"""A report on a whole cohort, before hours are spent on it: everything found is listed."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slidevlm.data.cases import Case, CaseStore
from slidevlm.data.parallel import each
from slidevlm.data.reports import names_of, report_id, value_of
from slidevlm.data.scan import Scan, scan
from slidevlm.data.splits import find, read_identifiers, report_of, some
from slidevlm.data.tokenizer import TextTokenizer
from slidevlm.errors import DataError

Level = Literal["error", "warning", "note"]
NO_SPLIT = "(no split)"
_BINS = 30
_EXAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """One thing that was found, and all that it was found in."""

    level: Level  # error: training stops or its results are worthless; note: good to know
    topic: str
    message: str
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitRow:
    """One split in numbers."""

    name: str
    identifiers: int
    specimens: int
    patients: int
    tiles: int
    reports: int
    truncated: int  # reports longer than the context


@dataclass(frozen=True)
class Histogram:
    """Counts in bins, by split."""

    title: str
    unit: str
    edges: tuple[float, ...]  # bins + 1
    counts: Mapping[str, tuple[int, ...]]  # split -> bins
    mark: float | None = None  # a limit, such as the context


@dataclass(frozen=True)
class ClassTable:
    """Specimens of each class in each split."""

    name: str  # of the label file
    classes: tuple[str, ...]
    counts: Mapping[str, tuple[int, ...]]  # split -> classes


@dataclass(frozen=True)
class Cohort:
    """All specimens in numbers."""

    path: str
    specimens: int
    patients: int
    slides: int
    tiles: int
    length: tuple[int, int, int] | None  # least, median, most tiles a specimen
    formats: tuple[str, ...]
    widths: tuple[int, ...]
    dtypes: tuple[str, ...]
    units: tuple[str, ...]
    encoders: tuple[str, ...]
    verified: int  # specimens whose checksum was compared


@dataclass
class CheckReport:
    """Everything `check` found."""

    findings: list[Finding] = field(default_factory=list)
    cohort: Cohort | None = None
    splits: list[SplitRow] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)
    classes: list[ClassTable] = field(default_factory=list)

    def add(self, level: Level, topic: str, message: str, items: Iterable[str] = ()) -> None:
        """Note a finding."""
        self.findings.append(Finding(level, topic, message, tuple(items)))

    def count(self, level: Level) -> int:
        """Number of findings of a level."""
        return sum(finding.level == level for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            **asdict(self),
        }


@dataclass(frozen=True)
class Texts:
    """How reports become tokens."""

    tokenizer: Callable[[Sequence[str]], TextTokenizer]  # trained on reports, or made before
    context: int  # tokens at most, BOS and EOS included


@dataclass(frozen=True)
class Labelled:
    """A label file, and the prompts of its classes where it has any."""

    name: str
    # Specimen or "<patient>/<specimen>" -> its class or classes.
    classes: Mapping[str, Sequence[str]]
    prompts: Mapping[str, Sequence[str]] | None  # class -> prompts; None: for examples or probes

    def of(self, case: Case) -> Sequence[str] | None:
        """The classes of a specimen, as evaluation finds them; None without a label."""
        return value_of(self.classes, case.specimen, case.patient)


@dataclass(frozen=True)
class _Member:
    """A specimen in a split."""

    split: str
    case: Case
    report: str


def check(
    report: CheckReport,
    store: CaseStore,
    splits: Mapping[str, Path],
    texts: Mapping[str, str] | None,
    tokens: Texts,
    labelled: Sequence[Labelled],
    *,
    cutoff: int,
    allow_patient_overlap: bool,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Add to `report` what is to be said of a cohort as training would use it; stops at nothing.

    Args:
        splits: name -> split file; "train" is the one the tokenizer learns from. Without any,
            all specimens are taken as one split.
        texts: reports by specimen, which then stand for those of the store.
        labelled: label files.
        cutoff: tiles read of a specimen at most.
        workers: reading processes.
    """
    named: set[str] = set()
    members = _members(report, store, splits, texts, named)
    scans = {}
    present = [case for case in store.cases if store.has_features(case)]
    for case, found in each(scan, store, present, workers):
        scans[case.specimen] = found
        progress(len(scans), len(present))
    scans = {case.specimen: scans[case.specimen] for case in present}  # in the cohort's order
    by_split: dict[str, list[str]] = {name: [] for name in splits}
    for member in members:
        by_split[member.split].append(member.case.specimen)
    used = {member.case.specimen for member in members} if splits else set(scans)

    _whole(report, store, scans)
    _absent(report, store, scans, named if splits else set(scans))
    _contents(report, scans, used)
    _mixtures(report, scans, used)
    _lengths(report, scans, by_split if splits else {"all": list(scans)}, cutoff)
    _leakage(report, members, allow_patient_overlap)
    _duplicate_slides(report, scans, members)
    everyone = members or [
        _Member("all", case, _report(report, case, store, texts)) for case in present
    ]
    if not splits:
        _without_report(report, everyone, "")
    _duplicate_reports(report, everyone)
    truncated = _tokens(report, everyone, splits, tokens, labelled)
    for one in labelled:
        _classes(report, one, everyone, store)
    _split_rows(report, splits, members, scans, truncated)


def _n(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _members(
    report: CheckReport,
    store: CaseStore,
    splits: Mapping[str, Path],
    texts: Mapping[str, str] | None,
    named: set[str],
) -> list[_Member]:
    """The specimens of every split that training would use; `named` gets all that a split names."""
    members = []
    for name, path in splits.items():
        try:
            found = find(identifiers := read_identifiers(path), store)
        except DataError as error:
            report.add("error", "split file", str(error))
            continue
        named.update(case.specimen for case in found.cases)
        if found.missing:
            none = not found.cases
            report.add(
                "error" if none else "warning",
                "missing",
                f"split {name}: {len(found.missing)} of {len(identifiers)} identifiers without "
                f"features in {store.path}",
                found.missing,
            )
        mine = [_Member(name, case, _report(report, case, store, texts)) for case in found.cases]
        _without_report(report, mine, f"split {name}: ")
        members += [member for member in mine if member.report]
    return members


def _without_report(report: CheckReport, members: Sequence[_Member], where: str) -> None:
    without = [member.case.specimen for member in members if not member.report]
    if without:
        report.add(
            "error" if len(without) == len(members) else "warning",
            "no report",
            f"{where}{len(without)} of {len(members)} specimens without report; training leaves "
            "them out",
            without,
        )


def _report(
    report: CheckReport, case: Case, store: CaseStore, texts: Mapping[str, str] | None
) -> str:
    try:
        return report_of(case, store, texts)
    except DataError as error:
        report.add("error", "report", str(error), [case.specimen])
        return ""


# -- features --------------------------------------------------------------------------------


def _whole(report: CheckReport, store: CaseStore, scans: Mapping[str, Scan]) -> None:
    lengths = [found.length for found in scans.values() if found.problem is None]

    def distinct(values: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(sorted({value for value in values if value is not None}))

    found = list(scans.values())
    report.cohort = Cohort(
        path=str(store.path),
        specimens=len(store.cases),
        patients=len({case.patient for case in store.cases}),
        slides=sum(len(one.slides) for one in found),
        tiles=sum(lengths),
        length=(min(lengths), int(np.median(lengths)), max(lengths)) if lengths else None,
        formats=distinct(one.facts.format for one in found),
        widths=distinct(one.width for one in found),
        dtypes=distinct(one.facts.dtype or one.dtype for one in found),
        units=distinct(one.facts.unit for one in found),
        encoders=distinct(one.facts.encoder for one in found),
        verified=sum(one.verified for one in found),
    )
    warned: dict[str, list[str]] = defaultdict(list)
    for one in found:
        for text in one.facts.warnings:
            warned[text].append(one.specimen)
    for text, specimens in warned.items():
        report.add("warning", "format", text, specimens)


def _absent(
    report: CheckReport,
    store: CaseStore,
    scans: Mapping[str, Scan],
    named: set[str],
) -> None:
    without = [case.specimen for case in store.cases if case.specimen not in scans]
    if without:
        report.add(
            "warning",
            "missing",
            f"{len(without)} of {len(store.cases)} specimens of {store.path} without features",
            without,
        )
    left = [name for name in scans if name not in named]
    if left:
        report.add(
            "warning",
            "no split",
            f"{len(left)} of {len(scans)} specimens in no split",
            left,
        )


def _contents(report: CheckReport, scans: Mapping[str, Scan], used: set[str]) -> None:
    """Errors of specimens that training would meet; the same elsewhere are warnings."""

    def both(topic: str, message: str, found: Sequence[Scan], items: Sequence[str]) -> None:
        listed: dict[Level, list[str]] = {"error": [], "warning": []}
        for one, item in zip(found, items, strict=True):
            listed["error" if one.specimen in used else "warning"].append(item)
        for level, chosen in listed.items():
            if chosen:
                where = "" if level == "error" else " (no split uses)"
                report.add(level, topic, f"{_n(len(chosen), 'specimen')}{where} {message}", chosen)

    all_of = list(scans.values())
    broken = [one for one in all_of if one.problem is not None]
    both(
        "unreadable", "that cannot be read", broken, [f"{s.specimen}: {s.problem}" for s in broken]
    )
    whole = [one for one in all_of if one.problem is None]
    empty = [one for one in whole if one.length == 0]
    both("empty", "without a tile", empty, [one.specimen for one in empty])
    bad = [one for one in whole if one.bad_rows]
    both(
        "not finite",
        "with NaN or infinite features",
        bad,
        [f"{one.specimen}: {one.bad_rows} of {one.length} tiles" for one in bad],
    )
    damaged = [one for one in whole if one.damaged]
    both(
        "checksum",
        "with another checksum than when written",
        damaged,
        [f"{one.specimen}: {', '.join(one.damaged)}" for one in damaged],
    )
    single = [one.specimen for one in whole if one.length == 1]
    if single:
        report.add("note", "one tile", f"{_n(len(single), 'specimen')} with a single tile", single)


def _mixtures(report: CheckReport, scans: Mapping[str, Scan], used: set[str]) -> None:
    """Widths, units, encoders, types and presence of positions that differ in one cohort."""
    full = [s for s in scans.values() if s.problem is None and s.length and s.specimen in used]
    kinds: tuple[tuple[Level, str, Callable[[Scan], object]], ...] = (
        ("error", "feature width", lambda one: one.width),
        ("error", "tile encoder", lambda one: one.facts.encoder),
        ("error", "positions", lambda one: "with" if one.has_positions else "without"),
        ("error", "unit of positions", lambda one: one.facts.unit),
        ("warning", "tile size", lambda one: one.facts.tile_size),
        ("note", "type of features", lambda one: one.facts.dtype or one.dtype),
    )
    for level, what, of in kinds:
        groups: dict[str, list[str]] = defaultdict(list)
        for one in full:
            if (value := of(one)) is not None:
                groups[str(value)].append(one.specimen)
        if len(groups) > 1:
            parts = sorted(groups.items(), key=lambda group: -len(group[1]))
            report.add(
                level,
                "mixture",
                f"the specimens differ in {what}: "
                + "; ".join(f"{v}: {len(n)} ({some(n, _EXAMPLES)})" for v, n in parts),
                # All but the most frequent: those are what is to be looked at.
                [f"{name}: {value}" for value, names in parts[1:] for name in names],
            )


def _lengths(
    report: CheckReport,
    scans: Mapping[str, Scan],
    by_split: Mapping[str, Sequence[str]],
    cutoff: int,
) -> None:
    values = {
        name: [
            scans[specimen].length
            for specimen in specimens
            if specimen in scans and scans[specimen].length
        ]
        for name, specimens in by_split.items()
    }
    report.histograms.append(_histogram("Tiles a specimen", "tiles", values, cutoff))
    above = [
        s for name in values for s in by_split[name] if s in scans and scans[s].length > cutoff
    ]
    if above:
        report.add(
            "note",
            "sampled",
            f"{_n(len(above), 'specimen')} with more tiles than --image-features-cutoff {cutoff}; "
            "that many are drawn",
            above,
        )


def _histogram(
    title: str, unit: str, values: Mapping[str, Sequence[int]], mark: float | None
) -> Histogram:
    """Bins of equal ratio, as bags and reports differ by factors."""
    everything = [value for one in values.values() for value in one if value > 0]
    least, most = (min(everything), max(everything)) if everything else (1, 1)
    edges = np.geomspace(least, most + 1, _BINS + 1)
    edges[0], edges[-1] = least, most + 1  # geomspace rounds
    counts = {n: tuple(np.histogram(one, edges)[0].tolist()) for n, one in values.items()}
    within = mark is not None and least <= mark <= 4 * most
    return Histogram(title, unit, tuple(edges.tolist()), counts, mark if within else None)


# -- splits ----------------------------------------------------------------------------------


def _leakage(report: CheckReport, members: Sequence[_Member], allowed: bool) -> None:
    patients: dict[str, dict[str, None]] = defaultdict(dict)
    for member in members:
        patients[member.split].setdefault(member.case.patient)
    for a, b in itertools.combinations(patients, 2):
        shared = [patient for patient in patients[a] if patient in patients[b]]
        if shared:
            report.add(
                "warning" if allowed else "error",
                "leakage",
                f"{_n(len(shared), 'patient')} both in split {a} and in split {b}",
                shared,
            )


def _duplicate_slides(
    report: CheckReport, scans: Mapping[str, Scan], members: Sequence[_Member]
) -> None:
    split_of = {member.case.specimen: member.split for member in members}
    owners: dict[str, list[str]] = defaultdict(list)
    for one in scans.values():
        for digest in one.slides:
            owners[digest].append(one.specimen)
    listed: dict[Level, list[str]] = {"error": [], "warning": []}
    for specimens in owners.values():
        if len(specimens) > 1:
            splits = {split_of[name] for name in specimens if name in split_of}
            parts = [f"{n} [{split_of.get(n, NO_SPLIT)}]" for n in specimens]
            listed["error" if len(splits) > 1 else "warning"].append(" = ".join(parts))
    for level, found in listed.items():
        if found:
            where = ", in different splits" if level == "error" else ""
            message = f"{_n(len(found), 'slide')} there more than once{where}"
            report.add(level, "duplicate slides", message, found)


def _duplicate_reports(report: CheckReport, members: Sequence[_Member]) -> None:
    owners: dict[int, list[_Member]] = defaultdict(list)
    for member in members:
        if member.report:
            owners[report_id(member.report)].append(member)
    patients: list[str] = []
    across: list[str] = []
    for same in owners.values():
        if len({member.case.patient for member in same}) > 1:
            text = " = ".join(f"{m.case.specimen} [{m.split}]" for m in same)
            (across if len({m.split for m in same}) > 1 else patients).append(text)
    for found, where in ((across, " and splits"), (patients, "")):
        if found:
            report.add(
                "warning",
                "duplicate reports",
                f"{_n(len(found), 'report')} of different patients{where}",
                found,
            )


def _split_rows(
    report: CheckReport,
    splits: Mapping[str, Path],
    members: Sequence[_Member],
    scans: Mapping[str, Scan],
    truncated: Mapping[str, int],
) -> None:
    for name, path in splits.items():
        mine = [member for member in members if member.split == name]
        try:
            identifiers = len(read_identifiers(path))
        except DataError:
            identifiers = 0  # reported by `_members`
        report.splits.append(
            SplitRow(
                name,
                identifiers,
                len(mine),
                len({member.case.patient for member in mine}),
                sum(scans[m.case.specimen].length for m in mine),
                len({report_id(member.report) for member in mine}),
                truncated.get(name, 0),
            )
        )


# -- texts and classes -----------------------------------------------------------------------


def _tokens(
    report: CheckReport,
    members: Sequence[_Member],
    splits: Mapping[str, Path],
    tokens: Texts,
    labelled: Sequence[Labelled],
) -> dict[str, int]:
    """What is said of reports and prompts as tokens; how many reports are cut, by split."""
    # Without a training split, the texts there are stand for those that a tokenizer learns from.
    learnt_from = ("train", "all") if "train" in splits else {m.split for m in members}
    learnt = [m.report for m in members if m.report and m.split in learnt_from]
    if not learnt:
        if splits:
            report.add("error", "no report", "no specimen to train on has a report")
        return {}
    tokenizer = tokens.tokenizer(learnt)
    for one in labelled:
        _prompts(report, one, tokenizer, tokens.context)
    return _texts(report, members, tokenizer, tokens.context)


def _texts(
    report: CheckReport, members: Sequence[_Member], tokenizer: TextTokenizer, context: int
) -> dict[str, int]:
    """Lengths in tokens; how many reports are cut, by split."""
    reports = [member for member in members if member.report]
    lengths: dict[str, list[int]] = {member.split: [] for member in reports}
    cut: dict[str, list[str]] = {member.split: [] for member in reports}
    for member in reports:
        length = len(tokenizer.tokens(member.report)) + 2
        lengths[member.split].append(length)
        if length > context:
            cut[member.split].append(f"{member.case.specimen}: {length}")
    title = "Tokens a report, BOS and EOS included"
    report.histograms.append(_histogram(title, "tokens", lengths, context))
    for name, specimens in cut.items():
        if specimens:
            report.add(
                "warning",
                "truncated",
                f"split {name}: {len(specimens)} of {len(lengths[name])} reports longer than "
                f"the model's context of {context} tokens (median "
                f"{int(np.median(lengths[name]))}, longest {max(lengths[name])}); what is "
                "beyond is cut",
                specimens,
            )
    return {name: len(specimens) for name, specimens in cut.items()}


def _prompts(report: CheckReport, one: Labelled, tokenizer: TextTokenizer, context: int) -> None:
    long = [
        f"{name}: {prompt}"
        for name, prompts in (one.prompts or {}).items()
        for prompt in prompts
        if tokenizer.is_truncated(prompt, context)
    ]
    if long:
        report.add(
            "warning",
            "truncated",
            f"{one.name}: {_n(len(long), 'prompt')} longer than the model's context of {context} "
            "tokens; what is beyond is cut",
            long,
        )


def _classes(
    report: CheckReport,
    one: Labelled,
    members: Sequence[_Member],
    store: CaseStore,
) -> None:
    """Balance of one label file, and where labels, prompts and data do not meet."""
    given = {kind for kinds in one.classes.values() for kind in kinds}
    prompted = given if one.prompts is None else set(one.prompts)
    names, strange = sorted(given | prompted), sorted(given - prompted)
    if strange:
        report.add("error", "labels", f"{one.name}: classes without a prompt", strange)
    known = {name for case in store.cases for name in names_of(case.specimen, case.patient)}
    lost = [name for name in one.classes if name not in known]
    if lost:
        report.add(
            "warning",
            "labels",
            f"{one.name}: {len(lost)} of {len(one.classes)} labelled specimens not in the data",
            lost,
        )
    counts: dict[str, Counter[str]] = {member.split: Counter() for member in members}
    without: dict[str, list[str]] = {member.split: [] for member in members}
    for member in members:
        kinds = one.of(member.case)
        if kinds is None:
            without[member.split].append(member.case.specimen)
        else:
            counts[member.split].update(kinds)
    for split, specimens in without.items():
        if specimens:
            report.add(
                "warning",
                "labels",
                f"{one.name}: {_n(len(specimens), 'specimen')} of split {split} without label",
                specimens,
            )
        absent = [name for name in names if not counts[split][name]]
        if absent:
            report.add(
                "warning",
                "classes",
                f"{one.name}: {len(absent)} of {len(names)} classes without a specimen in split "
                f"{split}",
                absent,
            )
    report.classes.append(
        ClassTable(
            one.name,
            tuple(names),
            {split: tuple(found[name] for name in names) for split, found in counts.items()},
        )
    )
