"""How commands end: the table of exit statuses, and one line."""

import errno

import pytest
from torch.utils.data import DataLoader, Dataset

from resnet_backbone.runtime import errors
from resnet_backbone.runtime.errors import one_line_errors, outcome

NO_FOLDER = f"{__file__} is a file, not a folder"


@pytest.mark.parametrize(
    "error, status, line",
    [
        (errors.UsageError("write\n  this"), 2, "error: write this"),
        (
            OSError(errno.ENOSPC, "?", "x.pth"),
            2,
            "x.pth cannot be written, the disk is full",
        ),
        (OSError(errno.ENOENT, "?", b"x.pth"), 2, "error: x.pth does not exist: check the path"),
        (OSError(errno.EIO, "Input/output error", "x"), 2, "x cannot be used (Input/output"),
        (OSError(errno.ENOTDIR, "?", f"{__file__}/x/y"), 2, f"y: {NO_FOLDER}"),
        (FileExistsError(errno.EEXIST, "?", __file__), 2, f"error: {NO_FOLDER}"),
        (ImportError("pip install it"), 2, "error: pip install it"),
        (errors.UnexpectedResults("AP is 1"), 1, "error: AP is 1"),
        (errors.TrainingDiverged("the loss is nan"), 3, "error: the loss is nan"),
        (FloatingPointError("boxes\nare nan"), 3, "error: boxes are nan"),
        (
            errors.Stopped("SIGTERM"),
            75,
            "stopped by SIGTERM; run the same command again, a training",
        ),
    ],
)
def test_statuses(capsys, monkeypatch, error, status, line):
    @one_line_errors
    def tool():
        raise error

    with pytest.raises(SystemExit) as ended:
        tool()
    said = capsys.readouterr().err
    assert ended.value.code == status and line in said and said.count("\n") == 1
    monkeypatch.setenv("RESNET_BACKBONE_TRACEBACK", "1")
    with pytest.raises(type(error)):
        tool()


class Broken(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise OSError("a.jpg: cannot be read")


def test_errors_of_a_loaders_worker_are_said_without_its_stack():
    with pytest.raises(OSError) as caught:
        list(DataLoader(Broken(), num_workers=1))
    assert "Original Traceback" in str(caught.value)
    assert outcome(caught.value) == ("error: a.jpg: cannot be read", 2)
