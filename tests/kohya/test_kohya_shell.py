"""Command lines as people keep them: .bat, .sh, PowerShell, pasted; Windows paths, quotes."""

from pathlib import Path

import pytest

from recast.errors import Refused
from recast.kohya.shell import commands, read_command, split

BAT = r"""@echo off
rem a comment that ends in ^
:: --fake train.py
set MODELS=C:\models
set "NAME=my lora"
call venv\Scripts\activate.bat
accelerate launch --num_cpu_threads_per_process 8 "sdxl_train_network.py" ^
  --pretrained_model_name_or_path="%MODELS%\pony v6.safetensors" ^
  --train_data_dir="C:\Tom's pics\" ^
  --output_name="%NAME%" ^
  --optimizer_args "betas=0.9,0.99" "d0=1e-5"
pause
"""
SH = r"""#!/bin/bash
# accelerate launch sdxl_train_network.py --old
MODEL=/models/pony.safetensors
export OUT="/out dir"
cd sd-scripts && accelerate launch sdxl_train_network.py \
    --pretrained_model_name_or_path=$MODEL \
    --output_dir="${OUT}/a" \
    --network_args preset=full 'conv_dim=4' \
    --train_data_dir=/my\ pics --sdpa > log.txt 2>&1
"""
PS1 = """$model = "D:\\m.safetensors"
accelerate launch train_network.py `
  --pretrained_model_name_or_path $model `
  --xformers
"""


def test_a_batch_file() -> None:
    (found,) = commands(BAT)
    assert found == (
        "accelerate", "launch", "--num_cpu_threads_per_process", "8", "sdxl_train_network.py",
        r"--pretrained_model_name_or_path=C:\models\pony v6.safetensors",
        "--train_data_dir=C:\\Tom's pics\\", "--output_name=my lora",
        "--optimizer_args", "betas=0.9,0.99", "d0=1e-5",
    )  # fmt: skip


def test_a_shell_script() -> None:
    (found,) = commands(SH)
    assert found == (
        "accelerate", "launch", "sdxl_train_network.py",
        "--pretrained_model_name_or_path=/models/pony.safetensors", "--output_dir=/out dir/a",
        "--network_args", "preset=full", "conv_dim=4", "--train_data_dir=/my pics", "--sdpa",
    )  # fmt: skip


def test_a_powershell_script() -> None:
    (found,) = commands(PS1)
    assert found[3:] == ("--pretrained_model_name_or_path", r"D:\m.safetensors", "--xformers")


def test_flags_alone_are_a_command() -> None:
    (found,) = commands("--network_dim 4 \\\n--network_alpha=2\n")
    assert found == ("--network_dim", "4", "--network_alpha=2")


@pytest.mark.parametrize(
    ("line", "mark", "words"),
    [
        (r'"a \"b\" c"', "", ('a "b" c',)),
        (r'--x="C:\out\" --y', "^", ("--x=C:\\out\\", "--y")),
        (r"C:\a\ b", "\\", ("C:\\a\\", "b")),
        (r"\\server\share", "\\", (r"\\server\share",)),
        ("it's", "^", ("it's",)),
        ("a^&b", "^", ("a&b",)),
        ("'a b'\"c d\"", "", ("a bc d",)),
        ("--empty=''", "", ("--empty=",)),
        ("''", "", ("",)),
    ],
)
def test_words(line: str, mark: str, words: tuple[str, ...]) -> None:
    assert split(line, mark) == words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo hello\n", "holds no training command"),
        ("python train_network.py --a\npython train_network.py --b\n", "holds 2 training commands"),
        ("python train_network.py --vae=%VAE%\n", "uses %VAE%, which it does not set"),
        ('python train_network.py --vae="x\n', 'a quote " is opened'),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text(text)
    with pytest.raises(Refused) as refusal:
        read_command(path)
    assert said in str(refusal.value)


def test_a_file_that_is_absent_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot be read"):
        read_command(tmp_path / "absent.bat")
    (tmp_path / "binary.bat").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refused, match="not UTF-8"):
        read_command(tmp_path / "binary.bat")
