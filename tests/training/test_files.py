import os
import stat

import pytest
import torch

from dynaconv.data.errors import InputError
from dynaconv.files import whole
from dynaconv.training.files import check_writable, load_model, save_model
from dynaconv.training.model import Config, build

SMALL = Config(layer="odconv", widths=[4, 8], classes=3)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_whole_file_takes_its_place(tmp_path):
    with whole(tmp_path / "new" / "a.txt") as temporary:
        temporary.write_text("text")
        assert not (tmp_path / "new" / "a.txt").exists()
        assert temporary.suffix == ".txt"
    assert names(tmp_path / "new") == ["a.txt"]
    assert (tmp_path / "new" / "a.txt").read_text() == "text"


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "a.txt") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(FileNotFoundError), whole(tmp_path / "a.txt"):
        pass
    assert (tmp_path / "a.txt").read_text() == "old"


def test_whole_files_have_the_permissions_of_others(tmp_path):
    (tmp_path / "plain").write_text("")
    with whole(tmp_path / "whole") as temporary:
        temporary.write_text("")
    plain, whole_mode = ((tmp_path / name).stat().st_mode for name in ("plain", "whole"))
    assert stat.S_IMODE(plain) == stat.S_IMODE(whole_mode)


def test_check_writable(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        check_writable(tmp_path / "file" / "b")


def test_a_saved_model_computes_the_same(tmp_path):
    model = build(SMALL).eval()
    save_model(tmp_path / "model.pt", model, SMALL)
    loaded, config = load_model(tmp_path / "model.pt")
    x = torch.randn(2, 3, 9, 13)
    assert config == SMALL
    assert not loaded.training
    assert torch.equal(loaded(x), model(x))


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["DYNACONV_TEST_EVIL"],)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNACONV_TEST_EVIL", str(tmp_path / "ran"))
    torch.save({"format": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil\.pt: damaged, or not a checkpoint"):
        load_model(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)  # the trap does work
    assert (tmp_path / "ran").exists()


def test_damaged_or_foreign_checkpoints(tmp_path):
    path = tmp_path / "model.pt"
    with pytest.raises(InputError, match=r"model\.pt: no such checkpoint"):
        load_model(path)
    save_model(path, build(SMALL), SMALL)
    good = path.read_bytes()
    for bad in (b"", b"garbage", good[: len(good) // 2]):
        path.write_bytes(bad)
        with pytest.raises(InputError, match=r"model\.pt: damaged, or not a checkpoint"):
            load_model(path)
    torch.save({"state": {}}, path)
    with pytest.raises(InputError, match=r"model\.pt: not a model written by `dynaconv train`"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.pop("state"), "state"),
        (lambda c: c["config"].update(tomorrow=1), "tomorrow"),
        (lambda c: c["config"].update(layer="nowhere"), "nowhere"),
        (lambda c: c["config"].update(widths=[4, 9]), "Error"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_why(tmp_path, change, text):
    path = tmp_path / "model.pt"
    save_model(path, build(SMALL), SMALL)
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(InputError, match=rf"model\.pt: does not fit this version.*{text}"):
        load_model(path)
