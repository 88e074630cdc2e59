"""Mistakes on the command line are told before vLLM is imported, and as the installed vLLM would judge them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pomarium.cluster.cli import main as cli
from pomarium.cluster.replica import engine_args, engine_options
from pomarium.worker.errors import SettingsError

OWN = ("--port", "--host", "--stages", "--max-model-len")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--prot", "81"], "There is no option --prot: did you mean --port?"),
        (["--max-num-sequences", "8"], "did you mean --max-num-seqs?"),
        (["--max-model", "8"], "did you mean --max-model-len?"),
        (["--gpu_memory_utilisation=0.5"], "did you mean --gpu-memory-utilization?"),
        (["--xyzzy"], "There is no option --xyzzy. "),
        (["-p", "81"], "There is no option -p. "),
        (["--max-num-seqs", "many"], "--max-num-seqs many: this is no whole number"),
        (["--max-num-seqs"], "this is no whole number"),
        (["--gpu-memory-utilization=x"], "x: this is no number"),
        (["--dtype", "flat16"], "--dtype flat16: it may be auto, bfloat16,"),
        (["--model", "x"], "first argument"),
        (["--distributed_executor_backend", "mp"], "places the workers"),
        (["-pp", "2"], "use --stages"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        engine_options.check(words, OWN)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ["--max-num-seqs", "8", "--max_num_batched_tokens=64", "-tp", "1"],
        ["--no-enable-prefix-caching", "--seed", "-1"],
        ["--compilation-config.mode", "3", "-cc.mode=3", "-O3", "-O", "2"],
        ["--hf-overrides", '{"a": 1}', "--hf-overrides.rope.x+", "4", "--config", "x.yaml"],
    ],
)
def test_what_vllm_takes_in_any_of_its_forms_passes(words: list[str]) -> None:
    engine_options.check(words)


def test_another_version_of_vllm_judges_its_options_itself() -> None:
    engine_options.check(["--xyzzy"], vllm="0.28.0")
    engine_options.check(["--max-num-seqs", "8"], vllm="0.28.0")


def test_the_file_is_what_the_installed_vllm_says() -> None:
    """Otherwise an option that there is would be refused: `make engine-options` writes the file anew."""
    assert engine_args.text(engine_args.options()) == engine_options.FILE.read_text(encoding="utf-8")
    assert json.loads(engine_options.FILE.read_text(encoding="utf-8"))["version"] == engine_options.known().version


def test_nothing_heavy_is_imported_for_that(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pomarium.cluster.cli.main import main\n"
        "status = main(['serve', '--prot', '81'])\n"
        "print(status, [m for m in ('vllm', 'ray', 'torch', 'transformers') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "1 []\n"
    assert done.stderr.startswith("pomarium: There is no option --prot: did you mean --port?")


def test_options_of_the_command_itself_are_meant_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["batch", "run", "in", "out", "--modle", "x"]) == 1
    assert "did you mean --model?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["rack", "join", "h", "--adress", "1.2.3.4"])
    assert "(did you mean --address?)" in capsys.readouterr().err
