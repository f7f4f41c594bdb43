"""Trained models from Python: the classes of any files, from their bytes alone.

A call reads its inputs in order and batches as many as the run's byte budget allows (data.eval_batch_bytes). It changes
nothing in the model, so threads may share one. Rejected alternatives: padded batches; a batch size in files, because
the memory of a file depends on its length.
"""

from __future__ import annotations

if __name__ == "__main__":  # `python -m bfsys.predict`
    from bfsys.start import main

    main("predict", "python -m bfsys.predict")

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor

from bfsys.answers import Prediction, ranked
from bfsys.batch import ByteBatch, Sample
from bfsys.checkpoint.files import EXPORTED
from bfsys.checkpoint.loading import load_model
from bfsys.config import Config
from bfsys.data.media.input_formats import input_format
from bfsys.data.streaming.byte_transforms import ByteTransform, parse_transforms, with_key
from bfsys.data.streaming.datasets import check_transforms
from bfsys.data.streaming.plan import within_budget
from bfsys.errors import UserError, collecting, did_you_mean, is_out_of_memory
from bfsys.explain.attribution import Classifier
from bfsys.explain.explanation import Explanation, explain
from bfsys.explain.references import LabelledFile, candidates
from bfsys.explain.shortcuts import Shortcuts, shortcuts
from bfsys.export import read_exported
from bfsys.files import exists
from bfsys.inputs import Input, Reader, is_one, named
from bfsys.model.byteformer import Block, ByteFormer
from bfsys.model.precision import Precision, set_precision
from bfsys.out_of_distribution import from_tree
from bfsys.process import free_memory_bytes

Weights = Literal["ema", "last"]
CHECKED_BYTES = 64 << 20  # for fewer bytes of tokens, it would take longer to ask for the free memory


class Model:
    """A trained model, as `load` returns it. Threads may use it at the same time. Processes may do so if they were
    started with the method `spawn` or `forkserver`: with `fork`, which is the default of `multiprocessing` on Linux
    before Python 3.14, PyTorch hangs once it has computed with several threads.

    Its methods take one input or several. An input is a path, the content of a file as bytes, bytearray or memoryview,
    a NumPy array uint8 [n], or a file that is open in binary mode, which is read from its current position. One input
    has one answer; a list, tuple or other iterable of n inputs has n answers in the same order. `files_in` lists the
    files of a folder.

    Inputs are read one after the other, and only those that are computed together are in memory. If any input has a
    problem, the call raises one UserError with all problems and returns no answers.

    >>> model = load("runs/tiny")
    >>> model.classes
    ('a0', 'a1', 'a2', 'b0', 'b1')
    >>> model.predict(bytes([40] * 30), top=1)[0].class_name in model.classes
    True
    >>> [len(classes) for classes in model.predict([b"one file", b"another one"])]
    [3, 3]
    >>> model.predict([b"", b"a good one", "missing.jpg"])
    Traceback (most recent call last):
        ...
    bfsys.errors.UserError: inputs[0]: empty; there is nothing to classify
    missing.jpg: cannot be read: No such file or directory; if this is content and not a path, pass bytes
    """

    def __init__(self, network: ByteFormer, config: Config, facts: dict, reader: Reader) -> None:
        """Use `load` instead. `network` is in eval mode and on its device. `facts` come from a checkpoint or an
        export."""
        self._network, self._reader = network, reader
        self._references: tuple[int, list[LabelledFile]] | None = None  # seed, and the files drawn with it
        self.config: Config = config
        """Every setting of the run."""
        self.classes: tuple[str, ...] = tuple(facts["classes"])
        """Names of the classes, by index."""
        self.step: int = facts["step"]
        """The step at which the weights were saved."""
        self.least_bytes: int = reader.least_bytes
        """Length of the shortest file that the model accepts, after data.byte_transforms."""
        self.max_bytes: int = network.architecture.max_bytes
        """Length of the longest file whose tokens all have different positions. Longer files are accepted too."""
        self.rounding_bytes: int = max(network.architecture.rounding_bytes, len(self.classes))
        """A shorter file takes about as much memory and time as one of this length, since its tokens are rounded up and
        it has a probability of each class."""
        self.input_formats: tuple[str, ...] = tuple(f.describe() for f in reader.formats)
        """Formats of pictures and sounds in training, such as `wav:uint8 of 1 s at 16,000 Hz`; empty if files were used
        as they were, or if the checkpoint does not contain the formats."""

    @property
    def reader(self) -> Reader:
        """Reads files in the way in which the model read its training files."""
        return self._reader

    def with_messages(self, origin: str, encode_option: str) -> Model:
        """The same model with other names in messages: `origin` for the model, `encode_option` for the option to encode
        files."""
        other = copy.copy(self)
        other._reader = replace(self._reader, origin=origin, encode_option=encode_option)
        return other

    @property
    def device(self) -> torch.device:
        """The device on which the model runs."""
        return self._network.head.weight.device

    def __repr__(self) -> str:
        formats = " or ".join(self.input_formats)
        others = "files" if not formats else " or other files" if self._reader.reads_any_format else ""
        return (
            f"<bfsys.Model {self._reader.origin}, step {self.step}: reads {formats}{others}, "
            f"with positions for {self.max_bytes:,} bytes; {len(self.classes)} classes; on {self.device}>"
        )

    @overload
    def predict(self, inputs: Input, top: int = 3, *, encode: bool = False) -> list[Prediction]: ...  # type: ignore[overload-overlap]

    @overload
    def predict(self, inputs: Iterable[Input], top: int = 3, *, encode: bool = False) -> list[list[Prediction]]: ...

    def predict(
        self, inputs: Input | Iterable[Input], top: int = 3, *, encode: bool = False
    ) -> list[Prediction] | list[list[Prediction]]:
        """The `top` likeliest classes of each input, the likeliest first; all classes if there are fewer.

        `encode` converts pictures and sounds that have no format of the training files into one, in memory, as `bfsys
        encode` does. Without it, a warning names the first such input. Raises UserError for inputs that cannot be used.

        >>> model = load("runs/tiny")
        >>> first, second = model.predict(b"one file", top=2)
        >>> first.probability >= second.probability
        True
        >>> model.classes[first.index] == first.class_name
        True
        """
        top = _whole_number("top", top, 1)
        answers = ranked(self._compute(inputs, self._probabilities_of, encode), self.classes, top)
        return answers[0] if is_one(inputs) else answers

    def probabilities(self, inputs: Input | Iterable[Input], *, encode: bool = False) -> np.ndarray:
        """The probabilities of the classes: float32 [classes] of one input, [n, classes] of n; each row sums to 1.
        `encode` has the same effect, and errors are the same, as for `predict`.

        >>> load("runs/tiny").probabilities([b"one file", b"another one"]).shape
        (2, 5)
        """
        values = self._compute(inputs, self._probabilities_of, encode).numpy()
        return values[0] if is_one(inputs) else values

    def embed(self, inputs: Input | Iterable[Input], *, encode: bool = False) -> np.ndarray:
        """The vector of each input from which the head computes the classes: float32 [dim] of one input, [n, dim] of n.
        It is the mean of the tokens after the last norm, weighted as model.pool says. `encode` has the same effect, and
        errors are the same, as for `predict`.

        >>> model = load("runs/tiny")
        >>> model.embed([b"one file", b"another one"]).shape == (2, model.config.model.dim)
        True
        """
        values = self._compute(inputs, self._network.features, encode).numpy()
        return values[0] if is_one(inputs) else values

    def out_of_distribution(self, inputs: Input | Iterable[Input], *, encode: bool = False) -> np.ndarray:
        """The out-of-distribution score of each input: float32 [] of one input, [n] of n. An input with a score above 1
        resembles none of the run's reference files, and its answer may be unreliable; see `bfsys.out_of_distribution`.

        `encode` has the same effect as for `predict`. Raises UserError for inputs that cannot be used, and if the
        checkpoint has no reference files: imported weights, runs of fewer than 20 readable files, and some checkpoints
        of earlier versions have none.

        >>> load("runs/tiny").out_of_distribution([b"a text", bytes(1000)]).shape
        (2,)
        """
        if self._reader.references is None:
            raise UserError(
                f"{self._reader.origin}: its checkpoint holds no reference files, to which inputs could be compared; "
                "runs that this version started with 20 readable files or more have them"
            )
        problems: list[str] = []
        samples = self._reader.samples(named(inputs), problems, lambda _: None, encode=encode)
        scores = np.array([self._reader.references.score(sample.data) for sample in samples], np.float32)
        if problems:
            raise UserError(*problems)
        return scores[0] if is_one(inputs) else scores

    def explain(
        self, input: Input, class_name: str | None = None, seed: int = 0, *, encode: bool = False
    ) -> Explanation:
        """Explain which bytes of one input are evidence for a class: its likeliest one, or `class_name`.

        Bytes are replaced by bytes of files of other classes from the run's evaluation split, drawn with the seed. If
        the split is not on this machine, they are replaced by the input's own bytes in another order. `encode` has the
        same effect as for `predict`. Raises UserError for an input that cannot be used and for an unknown class.

        >>> explanation = load("runs/tiny").explain(bytes([40] * 30))
        >>> explanation.summary()
        '100 % of the evidence lies in text'
        >>> explanation.gradients.shape, sum(window.end - window.first for window in explanation.windows)
        ((30,), 30)
        """
        if not is_one(input):
            raise UserError("explain takes one input at a time")
        seed = _whole_number("seed", seed, 0)
        index = None if class_name is None else self.class_index(class_name)
        problems: list[str] = []
        notes: list[str] = []
        # The references describe transformed files
        references = None if self._reader.transforms else self._reader.references
        plain = replace(self._reader, transforms=(), least_bytes=1, references=references)
        stored = next(plain.samples(named(input), problems, notes.append, encode=encode), None)
        if stored is None:
            raise UserError(*problems)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        self._check_memory([stored])
        with _plain_pytorch():
            return explain(
                self._classifier,
                self.classes,
                stored,
                self._reader.transformed(stored.key, stored.data).data,
                transforms=self._reader.transforms,
                files=self._references_of(seed),
                index=index,
                seed=seed,
            )

    def _references_of(self, seed: int) -> list[LabelledFile]:
        """The files drawn with a seed for explanations. They are cached for further explanations with the same seed."""
        known = self._references  # read only once, since other threads may replace it
        if known is None or known[0] != seed:
            known = self._references = (seed, candidates(self.config, self.classes, self._reader.transforms, seed))
        return known[1]

    def class_index(self, name: str) -> int:
        """Position of a class in `classes`. Raises UserError if the model does not have it."""
        if name not in self.classes:
            hint = did_you_mean(str(name), self.classes)
            raise UserError(f"class: the model has no class {name!r}{hint}; it has {len(self.classes)} classes")
        return self.classes.index(name)

    def shortcuts(self, split: str | None = None, limit: int = 200, seed: int = 0) -> Shortcuts:
        """Test whether the model uses headers, metadata or lengths instead of content. The test uses at most `limit`
        files of a split of the run's data (by default data.eval_split). Raises UserError if they cannot be read.
        """
        limit, seed = _whole_number("limit", limit, 2), _whole_number("seed", seed, 0)
        if len(self._reader.transforms) != len(self.config.data.byte_transforms):
            raise UserError(
                f"{self._reader.origin}: the report on shortcuts needs the run's key; leave out --transformed"
            )
        split = split or self.config.data.eval_split
        with _plain_pytorch():
            return shortcuts(self._classifier, self.config, self.classes, self._reader.transforms, split, limit, seed)

    @property
    def _classifier(self) -> Classifier:
        return Classifier(self._network, self.config.data.eval_batch_bytes)

    def answers(
        self,
        inputs: Iterable[tuple[str, Input]],
        problems: list[str],
        say: Callable[[str], None],
        *,
        top: int = 3,
        encode: bool = False,
    ) -> Iterator[tuple[str, list[Prediction], float | None]]:
        """For `bfsys predict`: yield (name, classes, out-of-distribution score if the run has reference files) of each
        usable named input, as soon as it is computed.

        Problems of other inputs are added to `problems`. `say` receives the warnings of `predict`.
        """
        references = self._reader.references
        for batch in self._batches(inputs, problems, say, encode):
            with collecting(problems):
                answers = ranked(self._forward(self._probabilities_of, batch), self.classes, top)
                for sample, classes in zip(batch, answers, strict=True):
                    yield sample.key, classes, references.score(sample.data) if references else None

    def probabilities_of(self, samples: list[Sample]) -> Tensor:
        """For `bfsys serve`: float32 [n, classes] on the CPU, of samples from `reader`, computed as one batch."""
        return self._forward(self._probabilities_of, samples)

    def _compute(
        self, inputs: Input | Iterable[Input], function: Callable[[ByteBatch], Tensor], encode: bool
    ) -> Tensor:
        """float32 [n, …] on the CPU: `function` of all inputs. After a problem, further inputs are only read, to
        collect all problems."""
        problems: list[str] = []
        notes: list[str] = []
        parts: list[Tensor] = []
        for batch in self._batches(named(inputs), problems, notes.append, encode):
            if not problems:
                parts.append(self._forward(function, batch))
        if problems:
            raise UserError(*problems)
        for note in notes:
            warnings.warn(note, stacklevel=3)
        if not parts:  # without inputs, a dummy gives the shape of answers
            return self._forward(function, [Sample("", np.zeros(self.least_bytes, np.uint8))])[:0]
        return torch.cat(parts)

    def _batches(
        self, inputs: Iterable[tuple[str, Input]], problems: list[str], say: Callable[[str], None], encode: bool
    ) -> Iterator[list[Sample]]:
        samples = self._reader.samples(inputs, problems, say, encode=encode)
        return batches_of(samples, self.config.data.eval_batch_bytes, self.rounding_bytes)

    def _forward(self, function: Callable[[ByteBatch], Tensor], samples: list[Sample]) -> Tensor:
        self._check_memory(samples)
        try:
            with _plain_pytorch(), torch.no_grad():
                return function(ByteBatch.from_samples(samples).to(self.device)).float().cpu()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        raise self._too_large(samples)

    def _check_memory(self, samples: list[Sample]) -> None:
        """Raise UserError if the tokens before and after the first block do not fit into main memory. PyTorch often
        gets more memory than there is, and the system then kills the process."""
        of_tokens, weight = self._network.architecture, self._network.head.weight
        tokens = sum(len(sample.data) for sample in samples) // of_tokens.stride
        needed_bytes = 2 * tokens * of_tokens.dim * weight.itemsize
        if self.device.type == "cpu" and needed_bytes > CHECKED_BYTES and needed_bytes > free_memory_bytes():
            raise self._too_large(samples)

    def _too_large(self, samples: list[Sample]) -> UserError:
        longest = max(samples, key=lambda sample: len(sample.data))
        beside = f", and for {len(samples) - 1:,} files beside it" if len(samples) > 1 else ""
        return UserError(
            f"{longest.key}: not enough memory on {self.device} for its {len(longest.data):,} bytes{beside}"
        )

    def _probabilities_of(self, batch: ByteBatch) -> Tensor:
        return self._network(batch).float().softmax(1)


@contextmanager
def _plain_pytorch() -> Iterator[None]:
    """PyTorch without two settings of the caller: autocast would change answers, and explanations need gradients, which
    do not exist in inference mode."""
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@_plain_pytorch()  # tensors that are made in inference mode can never be used for gradients
def load(
    path: str | os.PathLike[str],
    *,
    weights: Weights = "ema",
    device: str | torch.device | None = None,
    precision: Precision = "fp32",
    permute: str | os.PathLike[str] | None = None,
    transformed: bool = False,
) -> Model:
    """Load the model of a run directory (of its newest intact checkpoint), of one checkpoint directory, of weights from
    `bfsys import-corenet`, or of a folder that `bfsys export` wrote with safetensors.

    weights      "ema": the average, if the run keeps one; "last": the weights of the last step
    device       such as "cpu" or "cuda:1"; by default PyTorch's first GPU, or else the CPU
    precision    "fp32", or faster and less exact: "tf32" on GPUs, "bf16" (bfsys/model/precision.py)
    permute      key file of the run's byte transform `permute`, if its path has changed since training
    transformed  the run's data.byte_transforms have been applied to inputs already, so no key is needed

    Raises UserError for a path without an intact model, a wrong key, and invalid arguments.

    >>> load("runs/tiny", device="cpu")
    <bfsys.Model runs/tiny, step 120: reads files, with positions for 256 bytes; 5 classes; on cpu>
    """
    if weights not in get_args(Weights):
        raise UserError(f"weights: got {weights!r}; allowed: {', '.join(get_args(Weights))}")
    if precision not in get_args(Precision):
        raise UserError(f"precision: got {precision!r}; allowed: {', '.join(get_args(Precision))}")
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"the run: got {type(path).__name__}; a path is allowed")
    target, folder = _device(device), Path(path)
    is_export = exists(folder / EXPORTED)
    with torch.device("cpu"):  # also if torch.set_default_device has set another one
        network, config, facts = read_exported(folder) if is_export else load_model(folder, average=weights == "ema")
    if is_export and weights == "last" and facts.get("weights") == "ema":
        raise UserError(f"{path}: holds averaged weights; export the run with --weights last, or leave that out")
    transforms: tuple[ByteTransform, ...] = ()
    if not transformed:
        transforms = parse_transforms(with_key(config.data.byte_transforms, None if permute is None else Path(permute)))
        if facts["plan"] is not None:  # imported weights and old exports do not identify a key
            check_transforms(transforms, facts)
    elif not config.data.byte_transforms:
        raise UserError(f"--transformed: {path} was trained on files without transforms; leave the option out")
    formats = [input_format(tree["encoding"], tree) for tree in facts.get("input_formats", ())]
    reader = Reader(
        os.fspath(path),
        () if transformed else tuple(dict.fromkeys(f for f in formats if f.is_known)),
        reads_any_format=not all(f.is_known for f in formats),
        transforms=transforms,
        least_bytes=config.model.least_bytes,
        references=from_tree(facts.get("reference_files")),
    )
    # Explanations need gradients of tokens, not of weights, and recompute each block to save memory.
    network.requires_grad_(False)
    set_precision(network, precision)
    for module in network.modules():
        if isinstance(module, Block):
            module.activation_checkpointing = True
    return Model(network.to(target), config, facts, reader)


def _whole_number(name: str, value: object, least: int) -> int:
    """An argument as int, also if it is one of NumPy's integers. Raises UserError for anything else."""
    if isinstance(value, int | np.integer) and value >= least:
        return int(value)
    raise UserError(f"{name}: got {value!r}; a whole number of at least {least} is needed")


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
        if found.type not in ("cpu", "cuda"):  # such as meta, which computes nothing
            raise RuntimeError
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA
        reason = str(error).partition("\n")[0].partition("Expected one of")[0].strip()
        raise UserError(
            f"device: got {str(device)!r}, which cannot be used{f' ({reason})' if reason else ''}; allowed are 'cpu', "
            "'cuda' and 'cuda:N', or leave it out"
        ) from None
    return found


def batches_of(samples: Iterator[Sample], budget_bytes: int, least_bytes: int) -> Iterator[list[Sample]]:
    """Group samples in order into lists of at most `budget_bytes`, or of one larger sample. Samples shorter than
    `least_bytes` count as `least_bytes`."""
    return within_budget(((max(len(sample.data), least_bytes), sample) for sample in samples), budget_bytes)
