"""Images in folders: which are trained on and which are held out, from the names of folders and files alone."""

from __future__ import annotations

import pytest

from dptrain.data.image_files import find_images
from dptrain.errors import ConfigError


def make(root, *folders, num_images=3):
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(num_images):
            (root / folder / f"{number}.png").touch()


@pytest.mark.parametrize("other", ["eval", "dev", "Val", "testing"])
def test_a_folder_beside_train_is_no_class(tmp_path, other):
    """Held-out images of another name would be trained on, as one of two classes."""
    make(tmp_path, "train/cat", "train/dog", f"{other}/cat", f"{other}/dog")
    with pytest.raises(ConfigError, match=f"beside {other}: name the folder of held-out images val"):
        find_images(tmp_path)


def test_train_alone_holds_the_classes(tmp_path):
    """A part of it is held out, the same as where its classes lie in the folder itself."""
    make(tmp_path, "train/cat", "train/dog", num_images=40)
    alone = find_images(tmp_path)
    assert alone[0] == ["cat", "dog"]
    assert alone == find_images(tmp_path / "train")


def test_a_class_may_be_called_train(tmp_path):
    """Images that lie in the folder itself are those of a class."""
    make(tmp_path, "train", "car")
    assert find_images(tmp_path)[0] == ["car", "train"]


@pytest.mark.parametrize("num_images", [1, 2, 3, 30])
def test_each_class_has_images_on_both_sides(tmp_path, num_images):
    """One image of a class is trained on; of two or more one at least is held out, and not all."""
    names = [f"class{number}" for number in range(40)]
    make(tmp_path, *names, num_images=num_images)
    _, (train, labels), (held_out, held_out_labels) = find_images(tmp_path)
    assert set(labels) == set(range(40))
    assert set(held_out_labels) == (set(range(40)) if num_images > 1 else set())
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 40 * num_images


def test_more_files_move_none_to_the_other_side(tmp_path):
    """From 100 images of each class to 300 about a tenth is held out, and each image stays where it was."""
    make(tmp_path, "cat", "dog", num_images=100)
    _, (train, _), (held_out, _) = find_images(tmp_path)
    make(tmp_path, "cat", "dog", num_images=300)
    _, (more_train, _), (more_held_out, _) = find_images(tmp_path)
    assert set(train) <= set(more_train)
    assert set(held_out) <= set(more_held_out)
    assert 30 <= len(more_held_out) <= 90
