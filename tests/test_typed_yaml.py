"""Configs that are written are read back, overrides mean what was typed, and files of other tools load or are named."""

from __future__ import annotations

import codecs
import os
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bfsys.config import Augment, Config, Data, Model, Optim, Source, Train, load_config
from bfsys.errors import UserError
from bfsys.typed_yaml import LISTED, dump, flatten, from_tree, load, to_tree

MINIMAL = "data: {sources: [{path: a}], lanes: 4, batch_samples: 8}\n"
ODD_TEXTS = [
    "", " ", " a ", "1", "1e-3", "1.0e-3", ".5", "5.", "-.inf", ".nan", "0x10", "0o7", "010", "1_000", "1:30", "+1",
    "on", "no", "true", "False", "null", "Null", "~", "<<", "=", "2026-11-26", "a: b", "a #b", "#", "- a", "? a", "-",
    "[a", "{", "}", "&a", "*a", "!a", "%a", "@a", "`", "'", '"', '"a"', "it's", "a\\b", "\t", "a\tb", "\n", "a\nb\n",
    "\r", "a\r\nb", "\0", "\x1b[0m", "\x85", "\u2028", "\ufeff", "\ufeffa", "é", "e\u0301", "😀", "caf\udce9",
    "\ud83d\ude00", "\U0010ffff", "\U0010ffff00dce9", "a" * 300, "a b " * 60,
]  # fmt: skip
texts = st.sampled_from(ODD_TEXTS) | st.text(st.characters(exclude_categories=()))
paths = texts.filter(lambda text: text and not set("$\0") & set(text) and not text.startswith("~"))
shares = st.floats(0, 1, exclude_max=True)
positive = st.floats(0, exclude_min=True, allow_infinity=False, allow_nan=False)
counts, whole = st.integers(1, 2**40), st.integers(0, 2**40)
augments = st.builds(Augment, encoding=texts, background=st.none() | paths, mixup=st.booleans(),
                     speeds=st.lists(positive).map(tuple), seconds=positive)  # fmt: skip
sources = st.builds(Source, path=paths, weight=positive, eval_path=st.none() | paths, augment=st.none() | augments)
configs = st.builds(
    Config,
    data=st.builds(
        Data, sources=st.lists(sources, max_size=2).map(tuple), train_split=texts, eval_split=texts,
        mixture=st.sampled_from(["weights", "sqrt"]) | st.floats(0.1, allow_infinity=False),
        byte_transforms=st.lists(texts.filter(lambda text: not text.startswith("permute")), max_size=2).map(tuple),
        cache_dir=st.none() | paths, micro_batch_bytes=st.none() | counts, max_bad_share=shares, cache_gb=positive,
    ),
    model=st.builds(Model, merge_after=st.none() | st.lists(whole).map(tuple), compiled=st.booleans(), dim=st.none()),
    optim=st.builds(Optim, lr=positive, eps=positive, beta1=shares),
    train=st.builds(Train, steps=counts, seed=whole, init_from=st.none() | paths),
    name=texts,
    runs_dir=paths,
)  # fmt: skip


def config_with(name: str) -> Config:
    return Config(data=Data(sources=(Source(path=name or "a"),), train_split=name, byte_transforms=(name,)), name=name)


def every_odd_text(test):
    for text in ODD_TEXTS:
        if not text.startswith("~") and "\0" not in text:
            test = example(config_with(text))(test)
    return test


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs") / "some.yaml"


@settings(max_examples=60, deadline=None)
@every_odd_text
@given(configs)
def test_every_config_is_read_back_as_it_was_written(file: Path, config: Config) -> None:
    file.write_bytes(dump(config).encode())
    assert load(Config, file) == config
    assert from_tree(Config, to_tree(config), "x") == config


@pytest.mark.parametrize("text", [text for text in ODD_TEXTS if text and text[0] not in "\"'"])
def test_text_is_taken_as_typed(file: Path, text: str) -> None:
    file.write_text(MINIMAL)
    config = load(Config, file, [f"name={text}", f"data.eval_split={text}", f"data.sources.0.augment.encoding={text}"])
    assert (config.name, config.data.eval_split, config.data.sources[0].augment.encoding) == (text,) * 3


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ('"123"', "123"),
        ("'123'", "123"),
        ('""', ""),
        ('"it\'s #7"', "it's #7"),
        ('"a" and "b"', '"a" and "b"'),
        ('"', '"'),
        ("'a\"", "'a\""),
        ("a'b'", "a'b'"),
        ("[a", "[a"),
    ],
)
def test_text_in_one_pair_of_quotes_is_the_text_between_them(file: Path, typed: str, meant: str) -> None:
    file.write_text(MINIMAL)
    assert load(Config, file, [f"name={typed}"]).name == meant


def test_null_is_nothing_where_the_field_may_be_empty(file: Path) -> None:
    file.write_text(MINIMAL + "train: {init_from: a}\nmodel: {dim: 3}\n")
    config = load(Config, file, ["train.init_from=null", "name=null", "model.dim=null"])
    assert (config.train.init_from, config.name, config.model.dim) == (None, "null", None)
    assert load(Config, file, ["train.init_from='null'", "model.dim=~"]).train.init_from == "null"


def test_other_scalars_are_those_of_yaml(file: Path) -> None:
    file.write_text(MINIMAL)
    overrides = ["optim.lr=1e-4", "optim.eps= 1e-9 ", "train.steps=1_000", "model.compiled=true", "data.mixture=sqrt"]
    config = load(
        Config, file, [*overrides, "data.byte_transforms=[reverse, 'stride:2']", "data.byte_transforms.0=a #b"]
    )
    assert (config.optim.lr, config.optim.eps, config.train.steps) == (1e-4, 1e-9, 1000)
    assert (config.model.compiled, config.data.mixture) == (True, "sqrt")
    assert config.data.byte_transforms == ("a #b", "stride:2")
    assert load(Config, file, ['data.sources=[{path: "base #2"}]']).data.sources == (Source(path="base #2"),)


def test_numbers_long_files_and_devices_are_not_configs(file: Path) -> None:
    file.write_bytes(b"3")
    with pytest.raises(UserError, match="expected `key: value` lines at the top, got a whole number"):
        load(Config, file)
    os.truncate(file, 16_000_001)
    with pytest.raises(UserError, match="has more than 16,000,000 bytes"):
        load(Config, file)
    with pytest.raises(UserError, match="config /dev/zero: is not a regular file, but a pipe or a device"):
        load(Config, "/dev/zero")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.sources=[{path: base #2}]", "put a text with a # in quotes"),
        ("data.sources=[{path: a}] #2", "' #2' follows the end; close every bracket"),
        ("data.sources=[{path: a}", "close every bracket"),
        ("data.sources=[{path: a}]]", "but found ']'; close every bracket"),
        ("data.sources=[{path: a\udce9}]", "the character '\\udce9' at position 9 is not allowed in YAML"),
        ("train.steps=10 #20", "train.steps: got '10 #20'; it must be a valid integer"),
        ("optim.lr=<<", "optim.lr: got '<<'; it must be a valid number"),
        ("train.steps=" + "9" * 5000, "cannot be read as int"),
        ("data.byte_transforms=reverse", "data.byte_transforms: got 'reverse'; write a list, such as [a, b]"),
        ("model.compiled=on", "model.compiled: got 'on'; write true or false"),
        ("model=tiny", "model: got 'tiny'; write its keys under it"),
        ("data.sources.²=3", "the list has entries 0 to 0"),
    ],
)
def test_a_wrong_override_is_never_taken_for_something_else(file: Path, override: str, said: str) -> None:
    file.write_text(MINIMAL)
    with pytest.raises(UserError) as caught:
        load(Config, file, [override])
    (problem,) = caught.value.problems
    assert said in problem
    assert "\n" not in problem


def test_a_number_where_text_is_expected_needs_quotes(file: Path) -> None:
    file.write_text(MINIMAL + "name: 123\n")
    with pytest.raises(UserError, match="name: got 123; text is expected; put it in quotes"):
        load(Config, file)


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: codecs.BOM_UTF8 + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
    ],
)
def test_files_of_other_editors_load(file: Path, encode) -> None:
    file.write_bytes(encode(MINIMAL + "name: été\n"))
    assert load(Config, file).name == "été"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("name: été".encode("latin-1"), "is not text in UTF-8"),
        (
            "name: a".encode("utf-16-le"),
            "is not text in UTF-8 (a NUL, as in UTF-16 without a byte order mark at byte 1); save",
        ),
        (b"data:\n\tlanes: 4\n", "line 2, column 1: found character '\\t'"),
        (b"name: " + b"9" * 5000, "cannot be read as int"),
        (b"name: !!binary aGk=", "name: got bytes; text"),
        (b"name: &a [*a]", "name.0: an alias in it contains itself"),
        (b"name: " + b"[" * 5000, "is nested too deeply"),
    ],
)
def test_files_that_cannot_be_read_are_named_in_one_line(file: Path, content: bytes, said: str) -> None:
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(Config, file)
    (problem,) = caught.value.problems
    assert problem.startswith(f"config {file}")
    assert said in problem
    assert "\n" not in problem


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home, and a variable DATA. The current folder has a file named $LITERAL."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    monkeypatch.delenv("LITERAL", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$LITERAL").touch()
    return tmp_path


PATH_FIELDS = [
    "data.sources.0.path", "data.sources.0.eval_path", "data.sources.0.augment.background", "data.cache_dir",
    "train.init_from", "runs_dir", "data.byte_transforms.0",
]  # fmt: skip


@pytest.mark.parametrize("field", PATH_FIELDS)
def test_paths_are_expanded_on_the_command_line_and_in_files(home: Path, field: str) -> None:
    config_file = home / "some.yaml"
    config_file.write_text(MINIMAL)
    prefix = "permute:" if field.startswith("data.byte") else ""
    base = ["data.byte_transforms=[reverse]", "data.sources.0.augment={encoding: tiff}"]

    def value(typed: str) -> str:
        config = load(Config, config_file, [*base, f"{field}={prefix}{typed}"])
        node = asdict(config)
        for part in field.split("."):
            node = node[int(part) if part.isdecimal() else part]
        again = home / "again.yaml"
        again.write_text(dump(config))
        assert load(Config, again) == config
        return node.removeprefix(prefix)

    assert value("~/x") == f"{home}/home/x"
    assert value("$DATA/x y") == value("${DATA}/x y") == f"{home}/data/x y"
    assert value("$LITERAL") == "$LITERAL"
    assert value("a~b$") == "a~b$"
    for typed, name in (("$UNSET_/x", "UNSET_"), ("${DATA:-/x}", "DATA:-/x")):
        with pytest.raises(UserError, match=f"{field}.*the environment variable {name!r} is not set"):
            value(typed)
    with pytest.raises(UserError, match=f"{field}.*a path cannot hold a NUL"):
        value("a\0")


def test_a_resolved_config_is_not_expanded_again(home: Path) -> None:
    config = Config(data=Data(sources=(Source(path="$DATA"), Source(path="~/x"), Source(path="$UNSET_"))))
    assert from_tree(Config, to_tree(config), "x") == config


def test_commands_and_urls_are_left_alone(home: Path) -> None:
    config_file = home / "some.yaml"
    config_file.write_text(MINIMAL)
    for location in ("pipe:cat ~/$DATA/{file}", "https://host/~me/$DATA", "s3://$DATA"):
        assert load(Config, config_file, [f"data.sources.0.path={location}"]).data.sources[0].path == location


def test_an_empty_path_is_refused(home: Path) -> None:
    config_file = home / "some.yaml"
    config_file.write_text(MINIMAL)
    with pytest.raises(UserError, match=r"runs_dir: got an empty path; write \. for the current folder"):
        load(Config, config_file, ["runs_dir="])


def test_a_slash_at_the_end_of_a_url_does_not_change_the_dataset(home: Path) -> None:
    config_file = home / "some.yaml"
    config_file.write_text("data: {sources: [{path: s3://bucket/a}, {path: s3://bucket/a/}], lanes: 1}\n")
    with pytest.raises(UserError, match=r"s3://bucket/a = s3://bucket/a/ is given twice"):
        load_config(config_file)


@pytest.mark.parametrize("second", ["data/a", "./data/../data/a/", "link", "$DATA/a"])
def test_one_dataset_under_two_names_is_given_twice(home: Path, second: str) -> None:
    (home / "data" / "a").mkdir(parents=True)
    (home / "link").symlink_to(home / "data" / "a")
    config_file = home / "some.yaml"
    config_file.write_text(f"data: {{sources: [{{path: data/a}}, {{path: {second}}}], lanes: 1}}\n")
    with pytest.raises(UserError, match=r"data\.sources: data/a.* is given twice"):
        load_config(config_file)


@pytest.mark.parametrize(
    "value", ["!!bool maybe", "!!int ''", "!!float ''", "!!timestamp foo", "!!python/name:os.system", "!!set 7"]
)
def test_a_tag_that_the_value_does_not_fit_is_one_line(home: Path, value: str) -> None:
    config_file = home / "some.yaml"
    config_file.write_text(f"{MINIMAL}train: {{seed: {value}}}\n")
    with pytest.raises(UserError) as error:
        load(Config, config_file)
    (problem,) = error.value.problems
    assert re.search(r"some\.yaml, line \d+, column \d+: .", problem)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("!!binary aGk=", "config .*: train.seed: got bytes; text, numbers, true, false"),
        ("2026-11-28T10:00:00Z", "train.seed: got '2026"),
        ("!!timestamp 2026-11-28", "train.seed: got date; text, numbers"),
        ("!!set {a}", "train.seed: got set; text, numbers"),
        ("&a [*a]", "train.seed.0: an alias in it contains itself"),
        ("1" * 5000, "line 2, column 15: '11111.*…' cannot be read as int"),
    ],
)
def test_a_value_that_no_config_may_hold_is_named_with_its_place(home: Path, value: str, said: str) -> None:
    config_file = home / "some.yaml"
    config_file.write_text(f"{MINIMAL}train: {{seed: {value}}}\n")
    with pytest.raises(UserError, match=said):
        load(Config, config_file)


def test_aliases_that_stand_for_a_multitude_of_values_are_refused_at_once(home: Path) -> None:
    lists = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lists += [f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]" for i in range(20)]
    config_file = home / "some.yaml"
    config_file.write_text("\n".join([*lists, MINIMAL]))
    with pytest.raises(UserError, match="holds more than 100,000 values, counting the values of its aliases"):
        load(Config, config_file)


def test_an_override_changes_one_of_two_places_with_the_same_alias(home: Path) -> None:
    config_file = home / "some.yaml"
    config_file.write_text("data: {lanes: 1, sources: [{path: a, jitter: &j {share: 0.5}}, {path: b, jitter: *j}]}\n")
    config = load_config(config_file, ["data.sources.0.jitter.share=0.9"])
    assert [source.jitter.share for source in config.data.sources if source.jitter] == [0.9, 0.5]


def test_a_path_that_no_file_can_have_is_refused(home: Path) -> None:
    config_file = home / "some.yaml"
    config_file.write_text('data: {sources: [{path: "a\\ud800"}], lanes: 1}\n')
    with pytest.raises(UserError, match=r"data\.sources\.0\.path: got 'a\\ud800', which cannot be the name of a file"):
        load_config(config_file)


def test_a_flat_tree_has_the_keys_of_overrides() -> None:
    tree = {"name": "x", "data": {"sources": [{"path": "a"}, {"path": "b"}], "speeds": [1, 2]}, "model": {"dim": None}}
    assert flatten(tree) == {
        "name": "x", "data.sources.0.path": "a", "data.sources.1.path": "b", "data.speeds": [1, 2], "model.dim": None,
    }  # fmt: skip


def test_the_first_of_many_problems_are_listed(file: Path) -> None:
    file.write_text("data:\n  sources: [" + ", ".join("{way: x}" for _ in range(1000)) + "]")
    with pytest.raises(UserError) as error:
        load(Config, file)
    *listed, more = error.value.problems
    assert len(listed) == LISTED
    assert more.endswith(f": {2000 - LISTED:,} more values are wrong")
