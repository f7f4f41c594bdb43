"""The content head compared with one file at a time, and its place in the model."""

from dataclasses import replace

import numpy as np
import torch

from bfsys.batch import CONTENT_COLUMNS as COLUMNS
from bfsys.batch import CONTENT_ROWS as ROWS
from bfsys.batch import ByteBatch, Sample
from bfsys.checkpoint.files import CONTENT_HEAD
from bfsys.model.byteformer import ByteFormer
from bfsys.model.content_head import REACH, ContentHead
from bfsys.model.sizes import architecture

DIM = 8
COUNTS = [1, 2, 5, 64, 131]
SMALL = architecture("custom", dim=DIM, layers=2, heads=2, merge_after=(0,), kernel=4, window=8, shift=4, max_tokens=64)


def tables(files: int) -> torch.Tensor:
    return torch.randn(files, ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)).half()


def batch_of(*lengths: int, content: torch.Tensor | None = None) -> ByteBatch:
    rng = np.random.default_rng(0)
    samples = [Sample("", rng.integers(0, 256, n).astype(np.uint8), label=i % 3) for i, n in enumerate(lengths)]
    return replace(ByteBatch.from_samples(samples), content=content)


def model(*, with_content: bool = True) -> ByteFormer:
    torch.manual_seed(0)
    return ByteFormer(SMALL, 3, with_content=with_content).double()


def test_errors_are_those_of_each_token_by_itself() -> None:
    head = ContentHead(DIM).double()
    x = torch.randn(sum(COUNTS), DIM, dtype=torch.float64)
    content = tables(len(COUNTS))
    errors = head(x, torch.tensor(COUNTS), content)
    first = 0
    for file, count in enumerate(COUNTS):
        expected = []
        for i in range(count):
            row = int((i + 0.5) / count * ROWS)
            wanted = [content[file, min(max(row + away, 0), ROWS - 1)].double() for away in (-REACH, 0, REACH)]
            expected.append((head.rows(x[first + i]) - torch.cat(wanted)).square().mean())
        torch.testing.assert_close(errors[file], torch.stack(expected).mean())
        first += count


def test_files_without_a_table_have_no_error_and_no_gradient() -> None:
    content = tables(3)
    content[1] = torch.nan
    network = model()
    logits, errors = network(batch_of(30, 60, 90, content=content))
    assert logits.isfinite().all()
    assert errors[1] == 0
    assert (errors[[0, 2]] > 0).all()
    errors[1].backward()
    assert all(p.grad is None or not p.grad.any() for p in network.parameters())


def test_an_error_does_not_depend_on_the_other_files() -> None:
    content, network = tables(3), model()
    _, together = network(batch_of(30, 60, 90, content=content))
    batch = batch_of(30, 60, 90)
    for i, data in enumerate(batch.files()):
        alone = replace(ByteBatch.from_samples([Sample("", data, label=0)]), content=content[i : i + 1])
        torch.testing.assert_close(network(alone)[1], together[i : i + 1])


def test_the_other_weights_and_the_answers_are_those_of_a_model_without_it() -> None:
    with_it, without = model(), model(with_content=False)
    assert {name for name, _ in with_it.named_parameters() if name.startswith(CONTENT_HEAD)} == {
        "content_head.rows.weight",
        "content_head.rows.bias",
    }
    own = {name: value for name, value in with_it.state_dict().items() if not name.startswith(CONTENT_HEAD)}
    assert own.keys() == without.state_dict().keys()
    assert all(torch.equal(value, without.state_dict()[name]) for name, value in own.items())
    logits, _ = with_it(batch_of(30, 60, content=tables(2)))
    assert torch.equal(logits, without(batch_of(30, 60)))
    assert torch.equal(logits, with_it(batch_of(30, 60)))
