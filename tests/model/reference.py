"""A plain, padded ByteFormer, with which the real model is compared.

Everything that bfsys/model does cleverly (lookup tables, segments, ragged batches) is done here the
obvious way: one padded [B, L] tensor, an embedding, a convolution, whole score matrices, masks of 0 and
-inf. It shares no code with bfsys and is itself held against numbers of the published implementation
(test_reference.py). Speed and memory do not matter; refused was any step that needs a second look.

mode "released": the published code as it is. No mask has any effect: batch padding is attended and
averaged, and a shifted window wraps around the end of the sequence.
mode "intended": the published code with its padding mask and its shift mask effective.

Not reproduced is that the published LayerNorm takes a tensor [_, D, _] to be channel-first, that is,
when a window or the whole sequence happens to have D positions.

    B files   L bytes with padding   T tokens   D channels   H heads   E = D / H
    N windows of all files   W tokens per window   k kernel   s shift
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PAD = -1  # padding in x
PAD_ROW = 256  # row of the embedding that is zero and not trained
MODES = ("released", "intended")


@dataclass(frozen=True)
class ReferenceConfig:
    """The config of a reference model. `merge[i]`: token merging follows layer i."""

    dim: int
    heads: int
    kernel: int
    window: int
    shifts: tuple[int, ...]
    merge: tuple[bool, ...]
    max_tokens: int
    classes: int

    @property
    def layers(self) -> int:
        return len(self.shifts)


# --------------------------------------------------------------------------------------------- input, weights


def pad(files: Sequence[bytes], min_pad: int) -> Tensor:
    """Return files as int64 [B, L], padded on the right with -1; the longest by `min_pad`."""
    longest = max(len(file) for file in files)
    return torch.tensor([list(file) + [PAD] * (longest - len(file) + min_pad) for file in files])


def weight_shapes(config: ReferenceConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by its published name."""
    d = config.dim
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.weight": (257, d),
        "token_reduction_net.weight": (d, d, config.kernel),
        "pos_embed.pos_embed.pos_embed": (1, 1, config.max_tokens, d),
    }
    for layer in range(config.layers):
        block = f"transformer.{layer}"
        for norm in ("pre_norm_mha.0", "pre_norm_ffn.0"):
            shapes[f"{block}.{norm}.weight"] = shapes[f"{block}.{norm}.bias"] = (d,)
        for linear, d_out, d_in in (
            ("pre_norm_mha.1.qkv_proj", 3 * d, d),
            ("pre_norm_mha.1.out_proj", d, d),
            ("pre_norm_ffn.1", 4 * d, d),
            ("pre_norm_ffn.4", d, 4 * d),
        ):
            shapes[f"{block}.{linear}.weight"] = (d_out, d_in)
            shapes[f"{block}.{linear}.bias"] = (d_out,)
        if config.merge[layer]:
            merge = f"downsamplers.downsample_{layer}"
            shapes[f"{merge}.reduction.weight"] = (d, 2 * d)
            shapes[f"{merge}.norm.weight"] = shapes[f"{merge}.norm.bias"] = (d,)
    shapes["post_transformer_norm.weight"] = shapes["post_transformer_norm.bias"] = (d,)
    shapes["classifier.weight"] = (config.classes, d)
    shapes["classifier.bias"] = (config.classes,)
    return shapes


def random_weights(config: ReferenceConfig, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Draw weights that are so large that the logits depend on the bytes.

    With the published initialisation, an untrained network returns nearly the same logits for every input, and a
    comparison would show nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    d = config.dim
    weights = {}
    for name, shape in weight_shapes(config).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name == "embeddings.weight":
            weight = noise * d**-0.5
            weight[PAD_ROW] = 0
        elif name == "token_reduction_net.weight":
            weight = noise * 2 * (d * config.kernel) ** -0.5
        elif name == "pos_embed.pos_embed.pos_embed":
            weight = noise * 0.5 * d**-0.5
        elif name.endswith(".bias"):
            weight = noise * 0.1
        elif len(shape) == 1:  # the scale of a LayerNorm
            weight = 1 + noise * 0.2
        else:
            weight = noise * 1.5 * shape[1] ** -0.5
        weights[name] = weight.to(dtype)
    return weights


# -------------------------------------------------------------------------------------------------- the model


def reference_logits(weights: Mapping[str, Tensor], config: ReferenceConfig, x: Tensor, mode: str) -> Tensor:
    """Logits [B, classes] of files x (int64 [B, L], padded with -1), in the precision of the weights."""
    return reference_activations(weights, config, x, mode)["logits"]


def reference_activations(
    weights: Mapping[str, Tensor], config: ReferenceConfig, x: Tensor, mode: str
) -> dict[str, Tensor]:
    """The activations of `reference_logits`: after_pos, layer_i, downsample_i, post_norm, pooled, logits."""
    assert mode in MODES
    found = {}
    tokens, padding = stem(weights, config, x, mode)
    found["after_pos"] = tokens
    for layer in range(config.layers):
        tokens = windowed_block(weights, config, layer, tokens, padding, mode)
        found[f"layer_{layer}"] = tokens
        if config.merge[layer]:
            tokens, padding = merge_tokens(weights, layer, tokens, padding)
            found[f"downsample_{layer}"] = tokens
    tokens = layer_norm(weights, "post_transformer_norm", tokens)
    found["post_norm"] = tokens
    real = (padding == 0).to(tokens.dtype)  # [B, T]
    found["pooled"] = (tokens * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)  # [B, D]
    found["logits"] = linear(weights, "classifier", found["pooled"])
    return found


def stem(weights: Mapping[str, Tensor], config: ReferenceConfig, x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Tokens [B, T, D] and their padding mask [B, T]: 0, or -inf for a token without any real byte."""
    stride = config.kernel // 2
    ids = torch.where(x == PAD, PAD_ROW, x)  # [B, L]
    bytes_ = F.embedding(ids, weights["embeddings.weight"], padding_idx=PAD_ROW)  # [B, L, D]
    tokens = F.conv1d(bytes_.mT, weights["token_reduction_net.weight"], stride=stride).mT  # [B, T, D]
    count = tokens.shape[1]
    tokens = tokens + weights["pos_embed.pos_embed.pos_embed"][0, 0, :count]

    padding = torch.zeros(len(x), count, dtype=tokens.dtype)
    if mode == "intended":
        for t in range(count):
            empty = (x[:, t * stride : t * stride + config.kernel] == PAD).all(dim=1)  # [B]
            padding[empty, t] = -torch.inf
    return tokens, padding


def windowed_block(
    weights: Mapping[str, Tensor],
    config: ReferenceConfig,
    layer: int,
    tokens: Tensor,
    padding: Tensor,
    mode: str,
) -> Tensor:
    """One encoder block on windows of the (shifted) sequence. [B, T, D] -> [B, T, D]"""
    batch, count, dim = tokens.shape
    window, shift = config.window, config.shifts[layer]
    fill = -count % window
    tokens = F.pad(tokens, (0, 0, 0, fill))  # [B, T + fill, D]
    padding = F.pad(padding, (0, fill), value=-torch.inf)
    tokens = tokens.roll(-shift, dims=1)
    padding = padding.roll(-shift, dims=1)
    windows = tokens.reshape(-1, window, dim)  # [N, W, D]

    if mode == "intended":
        mask = shift_mask(batch, (count + fill) // window, window, shift, tokens.dtype)  # [N, W query, W key]
        mask = mask + padding.reshape(-1, 1, window)
        hopeless = (mask == -torch.inf).all(dim=2)  # [N, W query]: softmax of nothing would be NaN
        mask[hopeless] = 0
    else:
        mask = torch.zeros(len(windows), window, window, dtype=tokens.dtype)

    windows = windows + attention(weights, config, layer, windows, mask)
    windows = windows + mlp(weights, layer, windows)
    tokens = windows.reshape(batch, count + fill, dim)
    return tokens.roll(shift, dims=1)[:, :count]


def shift_mask(batch: int, per_file: int, window: int, shift: int, dtype: torch.dtype) -> Tensor:
    """[N, W, W]: in each file's last window, tokens that the shift moved from the start are masked from the others.

    A shift by a multiple of the window gives an empty slice, and therefore no mask. (For other shifts above the window
    the published slices are meaningless. No configuration has one.)
    """
    mask = torch.zeros(batch, per_file, window, window, dtype=dtype)
    if shift > 0:
        mask[:, -1, : window - shift, -shift:] = -torch.inf
        mask[:, -1, -shift:, : window - shift] = -torch.inf
    return mask.reshape(-1, window, window)


def attention(
    weights: Mapping[str, Tensor], config: ReferenceConfig, layer: int, windows: Tensor, mask: Tensor
) -> Tensor:
    """Multi-head attention within each window. [N, W, D], mask [N, W, W] -> [N, W, D]"""
    block = f"transformer.{layer}.pre_norm_mha"
    head_dim = config.dim // config.heads
    qkv = linear(weights, f"{block}.1.qkv_proj", layer_norm(weights, f"{block}.0", windows))
    query, key, value = qkv.split(config.dim, dim=-1)
    answers = []
    for head in range(config.heads):
        own = slice(head * head_dim, (head + 1) * head_dim)
        scores = (query[..., own] * head_dim**-0.5) @ key[..., own].mT + mask  # [N, W, W]
        answers.append(scores.softmax(dim=-1) @ value[..., own])  # [N, W, E]
    return linear(weights, f"{block}.1.out_proj", torch.cat(answers, dim=-1))


def mlp(weights: Mapping[str, Tensor], layer: int, windows: Tensor) -> Tensor:
    block = f"transformer.{layer}.pre_norm_ffn"
    hidden = F.gelu(linear(weights, f"{block}.1", layer_norm(weights, f"{block}.0", windows)))
    return linear(weights, f"{block}.4", hidden)


def merge_tokens(weights: Mapping[str, Tensor], layer: int, tokens: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Merge pairs of neighbours, [B, T, D] -> [B, ceil(T / 2), D]. Features are interleaved: c0t0, c0t1, c1t0 …"""
    merge = f"downsamplers.downsample_{layer}"
    tokens = torch.where((padding == 0)[:, :, None], tokens, 0)
    fill = tokens.shape[1] % 2
    tokens = F.pad(tokens, (0, 0, 0, fill))
    padding = F.pad(padding, (0, fill), value=-torch.inf)
    first, second = tokens[:, 0::2], tokens[:, 1::2]  # [B, T / 2, D] each
    pairs = torch.stack([first, second], dim=-1).flatten(2)  # [B, T / 2, 2 D], feature 2 c + t
    merged = layer_norm(weights, f"{merge}.norm", pairs @ weights[f"{merge}.reduction.weight"].T)
    return merged, torch.maximum(padding[:, 0::2], padding[:, 1::2])


def linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]
