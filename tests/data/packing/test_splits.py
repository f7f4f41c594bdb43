"""Names of splits, and the division of a class into train and val."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfsys.data.packing.splits import SPLIT_FOLDERS, files_for_val, split_of_name

NAMES = {
    "train": ("train", "Train", "TRAINING", "trn", "training_set", "Train Set", "trainset", "train_images"),
    "val": ("val", "Valid", "VALIDATION", "dev", "Dev-Set", "eval", "Evaluation", "validation data"),
    "test": ("test", "TEST", "Testing", "tst", "test_set"),
    None: ("cat", "trainer", "latest", "set", "", "value", "device", "train cat"),
}
keys_of_class = st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=2, max_size=30)
shares = st.floats(0.01, 0.99)


@pytest.mark.parametrize("split", NAMES)
def test_names_of_splits(split):
    assert {name: split_of_name(name) for name in NAMES[split]} == dict.fromkeys(NAMES[split], split)


def test_every_listed_name_means_its_split():
    assert {name: split_of_name(name) for name in SPLIT_FOLDERS} == SPLIT_FOLDERS


@given(keys_of_class, shares)
def test_a_class_of_two_files_or_more_is_on_both_sides(keys, val_share):
    assert 0 < len(set(files_for_val(keys, val_share))) < len(keys)


@given(keys_of_class.filter(lambda keys: len(set(keys)) > 1), shares)
def test_files_of_one_key_stay_together(keys, val_share):
    val = set(files_for_val(keys, val_share))
    assert not {keys[i] for i in val} & {key for i, key in enumerate(keys) if i not in val}


@given(st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=2, max_size=30, unique=True), shares)
def test_a_file_that_is_added_moves_at_most_one_old_file(keys, val_share):
    *old, new = keys
    before = {old[i] for i in files_for_val(old, val_share)}
    after = {keys[i] for i in files_for_val(keys, val_share)} - {new}
    assert len(before ^ after) <= 1


def test_large_classes_are_divided_by_share_and_added_files_move_none():
    keys = [f"cat/{i}" for i in range(2000)]
    before, after = ({keys[i] for i in files_for_val(keys[:n], 0.1)} for n in (1000, 2000))
    assert 60 < len(before) < 140
    assert before == after & set(keys[:1000])


def test_a_single_file_and_a_share_of_nothing_are_not_divided():
    assert files_for_val(["a"], 0.99) == []
    assert files_for_val(["a", "b", "c"], 0) == []
