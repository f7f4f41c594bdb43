"""Baselines for a run's figures on the same files: by size, by byte counts, by first bytes, and decoded.

    python tools/bench/baselines.py configs/small.yaml data.sources.0.path=data/shards/digits --decoded

Takes the config of a run, and measures top-1 on its evaluation split:

    largest class   of the training files
    file size       the class whose files' mean log-length is nearest
    byte counts     logistic regression (scikit-learn) on how often each byte value occurs in a file
    first bytes     logistic regression on the values of the first 64 bytes, which hold the header
    decoded         with --decoded: a plain convolutional network on pixels, or on a log-mel spectrogram, that learns
                    from the run's own batches (same files, augmentation, order and number of steps); one source only

The first four learn from one epoch of the run's batches. A model of bytes that does not beat them has not learned the
content of the files. The last is the accuracy of a network on decoded files.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from bfsys.start import let_signals_end_the_process

    let_signals_end_the_process()

import numpy as np
import torch
from torch import Tensor, nn

from bfsys.baselines import (
    batches_for_evaluation,
    batches_for_training,
    byte_counts,
    first_bytes,
    largest_class,
    nearest_size,
    tables_of,
)
from bfsys.batch import ByteBatch
from bfsys.commands.arguments import add_config
from bfsys.config import Config, load_config
from bfsys.data.media.encodings import resample, set_length
from bfsys.data.media.pictures import decode_image
from bfsys.data.media.sounds import decode_audio
from bfsys.data.streaming.datasets import Sources, open_evaluation, open_training
from bfsys.errors import UserError, run_command, summary_of
from bfsys.loss import TOP1, loss_and_sums
from bfsys.optim import learning_rate

SOUND_RATE_HZ, SOUND_S = 16_000, 1.0
MEL_BANDS = 64
WIDTHS = (32, 64, 128, 128)  # channels; each pair of convolutions halves the picture


class PlainCNN(nn.Module):
    """Pairs of 3 × 3 convolutions with batch norm, a mean, a linear head: [B, C, H, W] -> [B, classes]."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in WIDTHS:
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def picture(content: bytes, side: int) -> Tensor:
    """Return any picture as float32 [3, side, side], resized to a square."""
    from PIL import Image

    pixels = Image.fromarray(decode_image(content))
    if pixels.size != (side, side):
        pixels = pixels.resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(pixels).copy()).permute(2, 0, 1) / 127.5 - 1


def spectrogram() -> Callable[[bytes], Tensor]:
    """Return a function from any sound to float32 [1, bands, frames] of its first second."""
    from torchaudio.transforms import MelSpectrogram

    to_mel = MelSpectrogram(SOUND_RATE_HZ, n_fft=512, hop_length=160, n_mels=MEL_BANDS)

    def apply(content: bytes) -> Tensor:
        clip = decode_audio(content)
        clip = set_length(clip if clip.rate_hz == SOUND_RATE_HZ else resample(clip, SOUND_RATE_HZ), SOUND_S)
        return (to_mel(torch.from_numpy(clip.wave)) + 1e-6).log()[None] / 4

    return apply


def decoder(content: bytes, side: int) -> tuple[Callable[[bytes], Tensor], int]:
    """The decoder for files like this one, and the number of channels that it returns."""
    for decode, channels in ((lambda c: picture(c, side), 3), (spectrogram(), 1)):
        try:
            decode(content)
        except Exception:  # decoders raise anything
            continue
        return decode, channels
    raise UserError("the files are neither pictures nor sounds that can be decoded; leave out --decoded")


def decode_all(decode: Callable[[bytes], Tensor], batch: ByteBatch) -> Tensor:
    """float32 [B, C, H, W]."""
    try:
        return torch.stack([decode(content.tobytes()) for content in batch.files()])
    except Exception as error:  # decoders raise anything
        raise UserError(f"--decoded: one of the files {batch.samples.tolist()} cannot be decoded: {error}") from None


def decoded(config: Config, training: Sources, validation: Sources, side: int) -> tuple[float, int, float]:
    """Train the convolutional network for the run's steps. Returns top-1, number of parameters, and seconds."""
    began = time.perf_counter()
    torch.manual_seed(config.train.seed)
    batches = batches_for_training(config, training, config.train.steps)
    first = next(batches)
    decode, channels = decoder(first.files()[0].tobytes(), side)
    model = PlainCNN(channels, len(training.classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, weight_decay=config.optim.weight_decay)
    for number, batch in enumerate(itertools.chain([first], batches)):
        step, lane = divmod(number, config.data.lanes)
        logits = model(decode_all(decode, batch))
        loss, _ = loss_and_sums(logits, batch, 1, config.optim.label_smoothing)
        (loss / config.data.batch_samples).backward()
        if lane == config.data.lanes - 1:
            optimizer.param_groups[0]["lr"] = learning_rate(step, config.train.steps, config.optim)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    right, files_seen = 0.0, 0
    with torch.no_grad():
        for batch in batches_for_evaluation(config, validation):
            logits = model(decode_all(decode, batch))
            _, sums = loss_and_sums(logits, batch, 1)
            right, files_seen = right + float(sums[:, TOP1].sum()), files_seen + len(batch.labels)
    return right / files_seen, sum(p.numel() for p in model.parameters()), time.perf_counter() - began


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=summary_of(__doc__))
    add_config(parser)
    parser.add_argument("--decoded", action="store_true", help="train the convolutional network too")
    parser.add_argument(
        "--side", type=int, default=64, metavar="N", help="the network sees pictures of N × N pixels (default 64)"
    )
    args = parser.parse_intermixed_args(arguments)
    config = load_config(args.config, args.overrides)
    training = open_training(config)
    validation = open_evaluation(config, config.data.eval_split, training.classes)
    if not validation.splits:
        raise UserError(f"no source of {args.config} has the split {config.data.eval_split}")
    if args.decoded and len(config.data.sources) > 1:
        raise UserError("--decoded: one network cannot read both pictures and sounds; give one source at a time")
    train, val = tables_of(config, training, validation)
    print(f"{len(training.classes)} classes, learned from {len(train.labels):,} files, judged by {len(val.labels):,}")
    print(f"  {'largest class':<14} {100 * largest_class(training, val):6.2f} %")
    for name, judge in (("file size", nearest_size), ("byte counts", byte_counts), ("first bytes", first_bytes)):
        print(f"  {name:<14} {100 * judge(train, val):6.2f} %", flush=True)
    if args.decoded:
        top1, parameters, seconds = decoded(config, training, validation, args.side)
        print(f"  {'decoded':<14} {100 * top1:6.2f} %   {parameters:,} parameters, {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    run_command(main)
