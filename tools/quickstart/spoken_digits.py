"""The speech of make_digits.py: the words "zero" to "nine", spoken by espeak-ng, as short WAV files.

Decisions:
- espeak-ng keeps its state (noise, flutter, echo) in C globals that outlive even its own Terminate, and
  seeds its noise with the clock. A word therefore depends on all words before it. Utterances are divided
  into chunks of fixed size, and a new, seeded process speaks each chunk in order. The clips then depend only
  on the arguments, not on the number of cores. Rejected alternative: a process per utterance, whose start
  takes a hundred times as long as the speech.
- A variant is a voice. No variant of the validation split occurs in training. Variants that differ only in a
  final number (`iven`, `iven2`, …) are in one split, because some of them are nearly equal.
- A word is always complete: if it is longer than the clip, it is spoken again, faster. Rejected alternative:
  cutting it off, which turns "forty" into "four" and would reveal long words by their missing ends.
"""

import ctypes
import io
import itertools
import os
import pickle
import subprocess
import sys
import wave
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

from bfsys.errors import UserError, run_command

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# All English accents of espeak-ng except the Shavian script, which sounds like `en`. `en` is British. espeak-ng also
# has it as `en-gb`, but without variants.
ACCENTS = (
    "en", "en-029", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-gb-x-rp", "en-us", "en-us-nyc",
)  # fmt: skip
VAL_SHARE_OF_VARIANTS = 0.15
# Variants on which a classifier that was trained on the others makes more than 10 % errors; on the rest it makes 0.5 %
# (a small convolutional net on spectrograms of 8,000 Hz, four folds by variant). They whisper or have unusual formants.
EXCLUDED_VARIANTS = {"Alicia", "kaukovalta", "klatt", "klatt2", "shelby", "whisper", "whisperf", "zac"}
RATES_WPM = (250, 320)  # slower: most words exceed the clip; faster: "two" is under 80 ms and loses its vowel
MAX_RATE_WPM = 450
PITCHES = (30, 70)  # espeak-ng's scale: 0 to 99; 50 is the voice's default
ESPEAK_RATE_HZ = 22_050
CLIP_RATE_HZ = 5_000  # enough for the vowels' formants, and a third fewer tokens than at 8,000
CLIP_SAMPLES = 1_750  # 0.35 s
MAX_WORD_SAMPLES = 1_650  # 0.33 s, so that even the longest word can be shifted
TRIM_BELOW_PEAK_DB = 40
PEAKS = (0.6, 0.95)  # shares of full scale
NOISE_RMS = (0.002, 0.006)  # shares of full scale; one step of 8 bits is 0.008
CHUNK_UTTERANCES = 2_000


@dataclass(frozen=True)
class Utterance:
    """One speech file to be made: a digit spoken in one way."""

    split: str
    digit: int
    accent: str
    variant: str
    rate_wpm: int
    pitch: int
    encoding: str = "wav"


class Synthesizer:
    """espeak-ng in this process, as a context manager. Only one may exist, because its state is global."""

    # From espeak-ng's speak_lib.h.
    AUDIO_OUTPUT_SYNCHRONOUS = 2
    INITIALIZE_DONT_EXIT = 0x8000
    CHARS_UTF8 = 1
    RATE, PITCH = 1, 3
    CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.pieces: list[bytes] = []
        self.callback = self.CALLBACK(self._take)  # keep a reference: espeak-ng has only a pointer to it

    def __enter__(self) -> "Synthesizer":
        import espeakng_loader as loader

        try:
            self.espeak = ctypes.CDLL(loader.get_library_path())
        except OSError as error:
            raise UserError(f"the speech library of package espeakng-loader does not load: {error}") from None
        rate_hz = self.espeak.espeak_Initialize(
            self.AUDIO_OUTPUT_SYNCHRONOUS, 0, os.fsencode(loader.get_data_path()), self.INITIALIZE_DONT_EXIT
        )
        if rate_hz != ESPEAK_RATE_HZ:
            raise UserError(f"espeak-ng does not start: got {rate_hz} Hz, expected {ESPEAK_RATE_HZ} Hz")
        self.espeak.espeak_ng_SetRandSeed(ctypes.c_long(self.seed))  # Initialize seeds it with the clock
        self.espeak.espeak_SetSynthCallback(self.callback)
        return self

    def __exit__(self, *exception: object) -> None:
        self.espeak.espeak_Terminate()

    def _take(self, samples, n_samples: int, events) -> int:
        if samples and n_samples > 0:
            self.pieces.append(ctypes.string_at(samples, 2 * n_samples))
        return 0  # continue

    def say(self, text: str, voice: str, rate_wpm: int, pitch: int) -> np.ndarray:
        """Speak, and return int16 samples at 22,050 Hz."""
        self.pieces.clear()
        encoded = text.encode() + b"\0"
        if self.espeak.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserError(f"espeak-ng has no voice {voice!r}: is espeakng-loader older than 0.2.4?")
        self.espeak.espeak_SetParameter(self.RATE, rate_wpm, 0)
        self.espeak.espeak_SetParameter(self.PITCH, pitch, 0)
        size = ctypes.c_size_t(len(encoded))
        self.espeak.espeak_Synth(encoded, size, 0, 0, 0, self.CHARS_UTF8, None, None)
        self.espeak.espeak_Synchronize()
        return np.frombuffer(b"".join(self.pieces), np.int16)


def list_variants() -> list[str]:
    import espeakng_loader

    names = os.listdir(Path(espeakng_loader.get_data_path(), "voices", "!v"))
    return sorted(set(names) - EXCLUDED_VARIANTS)


def split_variants(variants: list[str], rng: np.random.Generator) -> dict[str, list[str]]:
    """Put whole families into one split. A family is the variants whose names differ only in a final number."""
    families: dict[str, list[str]] = {}
    for variant in variants:
        families.setdefault(variant.lower().rstrip("0123456789"), []).append(variant)
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for name in rng.permutation(sorted(families)).tolist():
        room_in_val = len(splits["val"]) + len(families[name]) <= VAL_SHARE_OF_VARIANTS * len(variants)
        splits["val" if room_in_val else "train"] += families[name]
    return splits


def plan_utterances(clips_per_class: dict[str, int], rng: np.random.Generator) -> list[Utterance]:
    """Plan the same voices equally often for every class, in random order."""
    utterances = []
    for split, variants in split_variants(list_variants(), rng).items():
        for digit in range(10):
            voices = itertools.cycle(rng.permutation(variants).tolist())
            for variant in itertools.islice(voices, clips_per_class[split]):
                accent = ACCENTS[rng.integers(len(ACCENTS))]
                rate_wpm = int(rng.integers(*RATES_WPM, endpoint=True))
                pitch = int(rng.integers(*PITCHES, endpoint=True))
                utterances.append(Utterance(split, digit, accent, variant, rate_wpm, pitch))
    return [utterances[i] for i in rng.permutation(len(utterances))]


def trim(samples: np.ndarray) -> np.ndarray:
    loudness = np.abs(samples.astype(np.int32))
    loud = np.flatnonzero(loudness > loudness.max(initial=0) * 10 ** (-TRIM_BELOW_PEAK_DB / 20))
    return samples[loud[0] : loud[-1] + 1] if loud.size else samples[:0]


def resample(samples: np.ndarray) -> np.ndarray:
    """Resample from 22,050 to 5,000 Hz (441 to 100) by cutting the spectrum. Returns float32, peak 1.

    On a grid of 441 samples this is exact, and needs no SciPy in the speaking processes.
    """
    blocks = -(-len(samples) // 441) + 1  # one more block of silence, for the ringing at the borders
    spectrum = np.fft.rfft(samples.astype(np.float32), n=441 * blocks)[: 50 * blocks + 1]
    word = np.fft.irfft(spectrum, n=100 * blocks)[: -(-len(samples) * 100 // 441)]
    return (word / np.abs(word).max()).astype(np.float32)


def speak(utterances: list[Utterance], seed: int) -> list[tuple[int, np.ndarray]]:
    """Speak in this process. A long word is spoken faster if necessary, so that all of it fits into the clip.

    Returns the rate in words per minute and the word for each utterance.
    """
    spoken = []
    with Synthesizer(seed) as synthesizer:
        for u in utterances:
            for rate_wpm in range(u.rate_wpm, MAX_RATE_WPM + 1, 10):
                samples = trim(synthesizer.say(WORDS[u.digit], f"{u.accent}+{u.variant}", rate_wpm, u.pitch))
                if len(samples) * CLIP_RATE_HZ <= MAX_WORD_SAMPLES * ESPEAK_RATE_HZ:
                    break
            else:
                raise UserError(f"voice {u.variant!r} is too slow: {WORDS[u.digit]!r} does not fit the clip")
            if not samples.size:
                raise UserError(f"voice {u.variant!r} is silent on {WORDS[u.digit]!r}")
            spoken.append((rate_wpm, resample(samples)))
    return spoken


def speak_in_fresh_process(utterances: list[Utterance], seed: int) -> list[tuple[Utterance, np.ndarray]]:
    """Run this file as a program that speaks. Returns each utterance with its actual rate, and the word.

    Rejected alternative: multiprocessing. If the main process is killed, the workers of its ProcessPoolExecutor never
    end. If a spawned process dies at its start, the main process waits for ever.
    """
    order = pickle.dumps((seed, [astuple(u) for u in utterances]))
    # In a new session, Ctrl-C reaches only the main process. If that dies, the output pipe of this one breaks.
    process = subprocess.run(
        [sys.executable, __file__], input=order, capture_output=True, start_new_session=True, check=False
    )
    if process.returncode != 0:
        said = process.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise UserError(f"the process of espeak-ng ended with status {process.returncode}: {said[-1]}")
    spoken = pickle.loads(process.stdout)
    pairs = zip(utterances, spoken, strict=True)
    return [(replace(u, rate_wpm=rate_wpm), word) for u, (rate_wpm, word) in pairs]


def main() -> None:
    """Speak in the new process: read utterances from standard input, and write words to standard output."""
    seed, utterances = pickle.load(sys.stdin.buffer)
    with open(1, "wb", closefd=False) as answer:
        answer.write(pickle.dumps(speak([Utterance(*u) for u in utterances], seed)))


def make_clip(word: np.ndarray, rng: np.random.Generator) -> bytes:
    """Put the word at a random place and loudness over noise, as a WAV file of fixed length."""
    clip = rng.uniform(*NOISE_RMS) * rng.standard_normal(CLIP_SAMPLES, dtype=np.float32)
    start = rng.integers(CLIP_SAMPLES - len(word), endpoint=True)
    clip[start : start + len(word)] += rng.uniform(*PEAKS) * word
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 1, CLIP_RATE_HZ, CLIP_SAMPLES, "NONE", ""))
        file.writeframes(np.clip(np.rint(128 + 127 * clip), 0, 255).astype(np.uint8).tobytes())
    return buffer.getvalue()


def make_utterances(
    clips_per_class: dict[str, int], plan_rng: np.random.Generator, clip_rng: np.random.Generator
) -> tuple[Counter, Iterator[tuple[Utterance, bytes]]]:
    """Return the number of clips of each split, and an iterator over the clips and their bytes."""
    utterances = plan_utterances(clips_per_class, plan_rng)
    chunks = [utterances[i : i + CHUNK_UTTERANCES] for i in range(0, len(utterances), CHUNK_UTTERANCES)]
    seeds = plan_rng.integers(2**31, size=len(chunks)).tolist()

    def encoded() -> Iterator[tuple[Utterance, bytes]]:
        with ThreadPoolExecutor(min(len(chunks), os.cpu_count() or 1)) as threads:
            try:
                for spoken in threads.map(speak_in_fresh_process, chunks, seeds):
                    yield from ((utterance, make_clip(word, clip_rng)) for utterance, word in spoken)
            except BaseException:  # also Ctrl-C: do not wait for the rest
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    return Counter(utterance.split for utterance in utterances), encoded()


if __name__ == "__main__":
    run_command(main)
