"""`slidevlm caption`: reports of slides, written by a trained model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slidevlm.app.slide_model import Report, SlideModel
from slidevlm.app.using import Cohort, Record, Using, collect, tell, to_terminal
from slidevlm.batch import Batch
from slidevlm.documents import Table
from slidevlm.run import configure_logging, write_text

FORMS = (".json", ".csv", ".txt")

log = logging.getLogger("slidevlm")


@dataclass(frozen=True)
class Captioning:
    """What `slidevlm caption` was asked for."""

    using: Using
    prompt: str
    decoding: dict[str, Any]  # settings of `Decoding` that are not left to the model
    as_json: bool = False


def caption(asked: Captioning) -> int:
    """Write a report of every specimen; the number written.

    The reports go to a file beside the output as they are ready. Interrupted, the same command
    goes on where it was.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    configure_logging(debug=False, main=True)
    using = asked.using
    using.check_output(FORMS)
    model = using.load()
    decoding = model.decoding(**asked.decoding)
    _tell_of_room(model, asked)
    cohort = Cohort(using)
    about = {
        "model": model.hash,
        "decoding": {**decoding.settings, "prompt": asked.prompt},
        "image_features_cutoff": using.image_features_cutoff,
        "precision": model.computes_in,
    }

    def use(batch: Batch, keep: Callable[[Record], None]) -> None:
        names = batch.specimen_ids

        def finished(number: int, drafts: list[Report]) -> None:
            keep(_record(names[number], drafts, decoding.best))

        model.write(batch.bags, names, decoding, asked.prompt, finished)

    if using.output is None:
        return to_terminal(using, model, cohort, "writing reports", about, use)
    results, partial = collect(using, model, cohort, "writing reports", about, use)
    records = results.records
    write_text(using.output, _formatted(records, about, using.output.suffix.lower()))
    partial.path.unlink()
    tell(using.output, results, cohort, model, "reports", as_json=asked.as_json)
    return len(records)


def _tell_of_room(model: SlideModel, asked: Captioning) -> None:
    """Where reports end before the limit that was asked for."""
    prompt = len(model.trained.tokenizer.tokens(asked.prompt)) if asked.prompt else 0
    room = model.trained.config.text.context_length - 1 - prompt
    most = asked.decoding.get("max_tokens", 0)
    if most > room > 0:
        log.warning(
            "--max-tokens %d: the context of the model has room for %d tokens%s, and reports end "
            "there",
            most,
            room,
            " after the prompt" if prompt else "",
        )


def _record(specimen: str, drafts: Sequence[Report], best: int) -> Record:
    texts = [
        {
            "report": one.text,
            "score": None if one.score is None else round(one.score, 4),
            "ended": one.ended,
            **({} if one.merit is None else {"merit": round(one.merit, 4)}),
        }
        for one in drafts
    ]
    others = {"alternatives": texts[1:]} if best > 1 else {}
    return {"id": specimen, **texts[0], **others}


def _formatted(records: Sequence[dict[str, Any]], about: dict[str, Any], ending: str) -> str:
    if ending == ".json":
        return json.dumps([{**r, **about} for r in records], indent=1, ensure_ascii=False) + "\n"
    decoding, precision = json.dumps(about["decoding"]), about["precision"]
    if ending == ".txt":
        origin = f"model {about['model']}, decoding {decoding}, precision {precision}"
        # Of a name as of a report: a line and a tab mean something here.
        texts = ["\t".join(" ".join(r[c].split()) for c in ("id", "report")) for r in records]
        return "\n".join([f"# {origin}", *texts]) + "\n"
    table = Table()
    # A reader of texts takes the first report of a name, so further ones have another.
    best = any("alternatives" in r for r in records)
    chosen = ["merit"] if any("merit" in r for r in records) else []
    table.writerow(["id", "report", "score", "ended", *chosen,
                    *(["alternatives"] if best else []),
                    "model", "decoding", "precision"])  # fmt: skip
    for r in records:
        others = [json.dumps(r["alternatives"], ensure_ascii=False)] if best else []
        table.writerow([r["id"], r["report"], r["score"], r["ended"], *(r[c] for c in chosen),
                        *others, about["model"], decoding, precision])  # fmt: skip
    return table.text()
