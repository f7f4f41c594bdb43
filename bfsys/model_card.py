"""The model card of an export: the model, its training data, its scores, and how to use it.

A card holds only what the run recorded: its config and data plan, the scores of the evaluation at the exported step,
and the formats of its files. The card names what a run does not record (origin and licences of files, the intended use)
as missing, for the publisher to add.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from bfsys.config import Config
from bfsys.data.media.encodings import AS_STORED
from bfsys.data.media.input_formats import input_format
from bfsys.errors import one_line
from bfsys.model.sizes import Architecture
from bfsys.out_of_distribution import from_tree

NAME = "README.md"  # most model hubs show this file first
SOURCE = re.compile(r"(?P<name>.*) \S+: (?P<samples>[\d,]+) samples, .* shards, (?P<bytes>[\d,]+) bytes, .*")
WITHOUT_BFSYS = {
    "model.pt2": """\
```python
# with PyTorch, and without bfsys
import numpy as np, torch
from torch.export.passes import move_to_device_pass

device = "cpu"  # or "cuda"
program = move_to_device_pass(torch.export.load("model.pt2"), device).module()
data = torch.from_numpy(np.fromfile("FILE", np.uint8)).to(device)
with torch.no_grad():
    probabilities = program(data)  # float32 [classes]
```""",
    "model.onnx": """\
```python
# with ONNX Runtime, and without bfsys
import numpy as np, onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(probabilities,) = session.run(["probabilities"], {"bytes": np.fromfile("FILE", np.uint8)})
```""",
}


def model_card(facts: Mapping, manifest: Mapping, config: Config, parameters: int, scores: Mapping | None) -> str:
    """The card in Markdown.

    `facts` is the content of model.json, including its files. `manifest` is the checkpoint's. `scores` is the line of
    metrics.jsonl on the run's evaluation after the exported step, or None.
    """
    sections = {
        "Model": _model(facts, manifest, parameters),
        "Classes": ["The classes are: " + ", ".join(_literal(name) for name in facts["classes"])],
        "Data": _data(facts, manifest, config),
        "Scores": _scores(facts, config, scores),
        "Training": _training(manifest, config),
        "Unusual input": _unusual_input(facts),
        "Limits": _limits(facts, config),
        "How to use it": _use(facts),
        "What this card does not say": [
            "A run records neither the origin of its files, nor their licences, nor the intended use of the model. "
            "Whoever publishes the model should add these here."
        ],
    }
    lines = [
        f"# {_literal(facts['run'])}",
        "",
        f"This model assigns a file to one of {len(facts['classes']):,} classes from its raw bytes. `bfsys export` "
        "wrote this card from what the run recorded.",
    ]
    for title, section in sections.items():
        lines += ["", f"## {title}", "", *section]
    return "\n".join(lines) + "\n"


def _model(facts: Mapping, manifest: Mapping, parameters: int) -> list[str]:
    a = Architecture(**facts["architecture"])
    versions = ", ".join(f"{name} {version}" for name, version in manifest.get("versions", facts["versions"]).items())
    rows = [
        ("run", f"{facts['run']}, step {facts['step']:,}, {_weights(facts['weights'])}"),
        ("architecture", f"ByteFormer: dimension {a.dim}, {a.layers} layers, {a.heads} heads; a token covers "
         f"{a.kernel} bytes, every {a.stride} bytes; windows of {a.window} tokens; {a.pool} pooling"),
        ("parameters", f"{parameters:,}"),
        ("input", f"the bytes of one file, at least {facts['least_bytes']:,}; tokens beyond {a.max_bytes:,} bytes "
         "share their positions"),
        ("output", f"probabilities of {len(facts['classes']):,} classes"),
        ("trained with", versions),
    ]  # fmt: skip
    if imported := manifest.get("imported"):
        rows.append(("imported from", f"{imported['file']}, sha256 {imported['sha256']}"))
    return _table(("", ""), rows)


def _weights(kind: str) -> str:
    return "averaged weights" if kind == "ema" else "weights of the last step"


def _data(facts: Mapping, manifest: Mapping, config: Config) -> list[str]:
    plan = manifest["plan"] or {}
    known = [input_format(tree["encoding"], tree) for tree in facts["input_formats"]]
    formats = [f.describe() if f.is_known else "stored: any format" for f in known]
    rows = []
    for number, source in enumerate(config.data.sources):
        found = SOURCE.fullmatch(plan.get(f"source {number}", ""))
        if not found:
            continue
        samples, total = (int(found[key].replace(",", "")) for key in ("samples", "bytes"))
        read_as = formats[number] if number < len(formats) else "not recorded"
        augmented = ", augmented" if source.augment else ""
        rows.append((found["name"], f"{samples:,}", f"{total:,}", f"{total / samples:,.0f}", f"{read_as}{augmented}"))
    if not rows:
        return ["The checkpoint records no training data."]
    lines = _table(("training files of", "files", "bytes", "mean bytes", "read as"), rows)
    if config.data.byte_transforms:
        transforms = ", ".join(config.data.byte_transforms)
        lines += [
            "",
            f"These transforms were applied to the bytes of every file, in this order: {_literal(transforms)}.",
        ]
    return lines


def _scores(facts: Mapping, config: Config, scores: Mapping | None) -> list[str]:
    split = _literal(config.data.eval_split)
    if scores is None:
        return [f"The run recorded no evaluation after step {facts['step']:,}. `bfsys evaluate RUN` makes one."]
    evaluated = "ema" if config.optim.ema_decay else "last"
    lines = [f"The run evaluated the split {split} after step {facts['step']:,}, with {_weights(evaluated)}."]
    if facts["weights"] != evaluated:
        lines += [f"This export holds the {_weights(facts['weights'])}, which the run did not evaluate."]
    joint = [("all", scores), *(scores["sources"].items() if len(scores.get("sources", {})) > 1 else ())]
    rows = [
        (name, f"{s['samples']:,}", _percent(s["top1"]), _percent(s["top5"]), f"{s['loss']:.4f}") for name, s in joint
    ]
    lines += ["", *_table(("files of", "files", "top-1 %", "top-5 %", "loss"), rows)]
    if by_class := scores.get("classes"):
        by_name = [(name, f"{c['samples']:,}", _percent(c["top1"])) for name, c in by_class.items()]
        lines += ["", *_table(("class", "files", "top-1 %"), by_name)]
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _training(manifest: Mapping, config: Config) -> list[str]:
    if "imported" in manifest:
        return ["The weights were imported, so their training is not known."]
    optim, train, steps = config.optim, config.train, manifest["step"]
    rates = f"AdamW {optim.lr:g}" if optim.name == "adamw" else f"Muon {optim.muon_lr:g}, AdamW {optim.lr:g}"
    rows = [
        ("steps", f"{steps:,} of {train.steps:,}, {config.data.batch_samples:,} files each"),
        ("peak learning rates", rates),
        ("schedule", f"{optim.warmup_steps:,} steps of warm-up, then a cosine to {optim.final_lr:g}"),
        ("initial weights", train.init_from or config.model.init),
        ("weight decay", f"{optim.weight_decay:g}"),
        ("largest norm of the gradient", f"{optim.clip_norm:g}" if optim.clip_norm else "not limited"),
        ("label smoothing", f"{optim.label_smoothing:g}"),
        ("weight of the content loss", f"{config.content_weight:g}" if config.content_weight else "no content loss"),
        ("decay of the averaged weights", f"{optim.ema_decay:g}" if optim.ema_decay else "no average"),
        ("precision", train.precision),
        ("seed", f"{train.seed}"),
    ]
    return [*_table(("", ""), rows), "", "`model.json` holds the whole config."]


def _unusual_input(facts: Mapping) -> list[str]:
    references = from_tree(facts["reference_files"])
    if references is None:
        return ["The run recorded no reference files, so there is no out-of-distribution score."]
    return [
        f"`model.json` describes {references.describe()} of the run: their first 16 bytes and their byte counts. The "
        "out-of-distribution score of a file compares it with them. Above 1, the file resembles none of them, and its "
        "answer should not be trusted. `bfsys predict` prints a note, and `bfsys.load(…).predict` warns. The score "
        "depends on formats and the statistics of bytes, not on meaning. The programs without bfsys give no score."
    ]


def _limits(facts: Mapping, config: Config) -> list[str]:
    lines = [
        "- The model gives one of its classes for every file, even for a file that belongs to none of them.",
        f"- The scores are those of files from the same source as the training files (the split "
        f"{_literal(config.data.eval_split)}). Other files may be classified worse.",
        "- The probabilities are not calibrated.",
    ]
    if any(tree["encoding"] != AS_STORED for tree in facts["input_formats"]):
        lines.append("- Files must have the format in the table above; `bfsys predict --encode` converts them.")
    if facts["byte_transforms"]:
        lines.append("- The programs take bytes to which the transforms above have been applied.")
    return lines


def _use(facts: Mapping) -> list[str]:
    lines = []
    if "model.safetensors" in facts["files"]:
        lines += ["```python", "import bfsys", "", 'model = bfsys.load(".")  # this folder', 'model.predict("FILE")']
        lines += ["```", ""]
    for name, code in WITHOUT_BFSYS.items():
        if name in facts["files"]:
            lines += [*code.splitlines(), ""]
    return [*lines, "`classes` in `model.json` has the names of the classes, in the order of the probabilities."]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(map(_literal, row)) + " |" for row in rows)]


def _literal(text: str) -> str:
    """One line of Markdown that shows the text as it is, since names of classes may contain any characters.

    HTML is escaped with entities, which all renderers of Markdown know; some of them ignore a backslash before `<`.
    """
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", escape(one_line(text), quote=False))
