"""Files are written whole or not at all, readable for whom new files are, and errors name them."""

import errno
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from bertkern.data.files import replacing, write_text


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_whoever_may_read_new_files_may_read_these(tmp_path):
    """`safetensors` gives its files to the owner alone."""
    (tmp_path / "plain").write_text("")
    with replacing(tmp_path / "weights") as temporary:
        save_file({"x": torch.zeros(1)}, temporary)
    write_text(tmp_path / "text", "a")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_what_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half of \ud83d")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_without_a_name_gets_the_files(tmp_path):
    path = tmp_path / "file"

    def fail(*names):
        with replacing(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *names)

    with pytest.raises(OSError, match="No space left") as caught:
        fail()
    assert caught.value.filename == str(path)
    with pytest.raises(OSError, match="elsewhere") as caught:
        fail("elsewhere")
    assert caught.value.filename == "elsewhere"
