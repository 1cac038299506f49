"""What the command line says: help at once, and one clear line for every input that cannot be used."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.numpy import save_file

from autotune.cli import EXAMPLES, main
from autotune.config import Workload
from autotune.demo import DRAFT, TARGET
from autotune.options import request_of

COMMANDS = [[], *([name] for name in EXAMPLES)]
HEAVY = {"torch", "transformers", "optuna", "sqlalchemy", "pandas", "plotly"}
SHOWS_MODULES = "import sys; from autotune.cli import main\ntry: main()\nfinally: print(*sys.modules)"

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`autotune run` with options, in an empty folder without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return lambda *options: CliRunner().invoke(
        main, ["run", *(() if "--budget" in options else ("--budget", "2GB")), *map(str, options)]
    )


def refuses(result: Result, *words: str, code: int = 2) -> bool:
    """Whether it ended with the code and one line of error that has the words, and nothing else went wrong."""
    lines = result.output.strip().splitlines()
    said = [line for line in lines if line.startswith("Error: ")]
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    assert said == lines[-1:], result.output
    assert "Traceback" not in result.output
    missing = [word for word in words if word not in said[0]]
    assert not missing, said[0]
    return True


def copy(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to)


# Help -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "autotune")
def test_help_shows_an_example_at_once_for_it_imports_nothing_heavy(command: list[str]) -> None:
    words = [sys.executable, "-c", SHOWS_MODULES, *command, "--help"]
    asked = subprocess.run(words, capture_output=True, text=True, check=True)
    assert f"autotune {' '.join(command)}" in asked.stdout.partition("Example:")[2]
    imported = set(asked.stdout.splitlines()[-1].split())
    assert "autotune.cli" in imported
    assert not imported & HEAVY


def test_every_command_of_the_contract_is_there() -> None:
    assert set(main.commands) == {"run", "plan", "report", "export", "verify", "generate", "serve"}


@pytest.mark.parametrize("command", [name for name in EXAMPLES if name not in ("verify", "generate")])
def test_the_example_in_the_help_is_one_that_parses(command: str) -> None:
    words = EXAMPLES[command].split()
    assert words[:2] == ["autotune", command]
    assert main.commands[command].make_context(command, words[2:]).params


# What run and plan refuse ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["much", "6.5XB", "", "-1GB", "0", "0GB", "nan", "inf"])
def test_a_budget_that_is_no_size_is_refused(run: Run, budget: str) -> None:
    assert refuses(run("--budget", budget), "--budget", "memory size")


@pytest.mark.parametrize("contexts", ["0", "-1", "512,0", "512,,1k", "", "2.5k", "long", "4m"])
def test_contexts_that_are_no_lengths_are_refused(run: Run, contexts: str) -> None:
    assert refuses(run("--contexts", contexts), "--contexts", "positive token count; write it like 512 or 4k")


@pytest.mark.parametrize(
    ("flag", "value", "mend"),
    [
        ("--new-tokens", "0", "write it like 512 or 4k"),
        ("--max-quality-loss", "-5%", "write it like 5% or 0.05"),
        ("--timeout", "0m", "write it like 90s, 30m or 2h"),
        ("--timeout", "soon", "write it like 90s, 30m or 2h"),
        ("--trials", "0", "x>=1"),
        ("--seed", "x", "integer"),
        ("--objective", "speed", "'end-to-end', 'decode', 'ttft'"),
        ("--device", "tpu", "write cpu, cuda or cuda:N"),
        ("--device", "cuda:0", "use --device cpu"),
        ("--device", "cuda", "use --device cpu"),
    ],
)
def test_options_that_cannot_be_are_refused_with_what_can(run: Run, flag: str, value: str, mend: str) -> None:
    assert refuses(run(flag, value), flag, mend)


@pytest.mark.parametrize(
    ("mix", "mend"),
    [
        ("512", "write it like 512:0.7,4k:0.3"),
        ("512:", "write it like 512:0.7,4k:0.3"),
        ("512:0,4k:1", "write it like 512:0.7,4k:0.3"),
        ("512:-1,4k:2", "write it like 512:0.7,4k:0.3"),
        ("512:nan", "write it like 512:0.7,4k:0.3"),
        ("long:1", "write it like 512 or 4k"),
        ("512:0.5,512:0.5", "512 is there twice"),
    ],
)
def test_a_mix_that_is_no_shares_of_lengths_is_refused(run: Run, mix: str, mend: str) -> None:
    assert refuses(run("--mix", mix), "--mix", mend)


def test_a_mix_of_other_lengths_than_the_contexts_is_refused(run: Run) -> None:
    assert refuses(run("--mix", "512:1,4k:1", "--contexts", "512,2k"), "--mix", "--contexts", "different lengths")


def test_the_contexts_and_their_shares_come_of_the_mix() -> None:
    def workload(*words: str) -> Workload:
        options = main.commands["plan"].make_context("plan", ["--budget", "2GB", "--device", "cpu", *words]).params
        return request_of({key: value for key, value in options.items() if key not in ("as_json", "by_layer")}).workload

    mixed = workload("--mix", "4k:1,512:3")
    assert (mixed.contexts, mixed.mix) == ((512, 4096), (0.75, 0.25))
    assert workload("--mix", "4k:1,512:3", "--contexts", "512,4k") == mixed
    assert (workload().contexts, workload().mix) == ((512, 2048, 4096), ())


def test_decoding_is_no_objective_where_only_the_first_token_is_asked_for(run: Run) -> None:
    assert refuses(run("--objective", "decode", "--new-tokens", "1"), "--objective decode", "--new-tokens 2 or more")


def test_a_budget_must_be_given() -> None:
    assert refuses(CliRunner().invoke(main, ["run"]), "--budget")


def test_a_context_beyond_the_models_maximum_is_refused(run: Run) -> None:
    assert refuses(run("--contexts", "512,64k"), "--contexts 65536", "--new-tokens 128", "65664 positions", "has 4")


# A model --------------------------------------------------------------------------------------------------------------


def test_a_model_folder_that_does_not_exist_is_refused(run: Run) -> None:
    assert refuses(run("--model", "./nowhere"), "--model ./nowhere", "give a model folder or an ID like org/name")
    assert refuses(run("--model", TARGET, "--draft", "./nowhere"), "--draft ./nowhere", "no such folder")


def test_an_id_that_the_hub_does_not_give_is_refused(tmp_path: Path) -> None:
    asked = subprocess.run(
        [sys.executable, "-m", "autotune", "run", "--model", "no-such/model", "--budget", "2GB"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 2
    assert "Traceback" not in asked.stderr
    said = asked.stderr.splitlines()[-1]
    assert said.startswith("Error: --model no-such/model: no such folder, and the hub does not give it: ")


def test_a_model_folder_without_a_config_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refuses(run("--model", "./empty"), "no config.json in empty", "give the folder of a Hugging Face model")


def test_a_config_that_is_not_json_is_refused(run: Run, tmp_path: Path) -> None:
    (copy(TARGET, tmp_path / "model") / "config.json").write_text("{")
    assert refuses(run("--model", "./model"), "model/config.json is not JSON", "download it again")


@pytest.mark.parametrize("kept", [0, 5, 200, -1000])
def test_a_truncated_safetensors_file_is_refused(run: Run, tmp_path: Path, kept: int) -> None:
    weights = copy(TARGET, tmp_path / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert refuses(run("--model", "./model"), "model/model.safetensors is truncated", "download it again")


def test_a_stop_token_that_is_none_is_refused_by_file_and_key(run: Run, tmp_path: Path) -> None:
    (copy(TARGET, tmp_path / "model") / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    assert refuses(run("--model", "./model"), "model/generation_config.json: eos_token_id has '</s>'", "give numbers")


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_refused_with_the_model_that_it_is_of(
    run: Run, tmp_path: Path, command: str, whole: bool
) -> None:
    model = copy(TARGET, tmp_path / "model")
    if not whole:
        for path in model.iterdir():
            path.unlink()
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    words = "model/adapter_config.json: this is an adapter of base_model_name_or_path = 'org/base'", "merge_and_unload"
    assert refuses(CliRunner().invoke(main, [command, "--model", "./model", "--budget", "2GB"]), *words)
    assert refuses(CliRunner().invoke(main, [command, "--draft", "./model", "--budget", "2GB"]), *words)


def test_a_chat_template_that_is_no_text_is_refused_by_file_and_key(run: Run, tmp_path: Path) -> None:
    (copy(TARGET, tmp_path / "model") / "chat_template.json").write_text('{"chat_template": null}')
    assert refuses(run("--model", "./model"), "model/chat_template.json: chat_template is NoneType, not a text")


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_folder_without_a_tokenizer_is_refused_before_anything_is_loaded(
    run: Run, tmp_path: Path, command: str
) -> None:
    model = copy(TARGET, tmp_path / "model")
    for path in model.glob("tokenizer*"):
        path.unlink()
    result = CliRunner().invoke(main, [command, "--model", "./model", "--budget", "2GB"])
    assert refuses(result, "no tokenizer in model (tokenizer.json or another)", "put the files")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')  # which has no vocabulary
    options = ["--contexts", "64", "--space", "quick", "--budget", "2GB"]
    assert CliRunner().invoke(main, ["plan", "--model", "./model", *options]).exit_code == 0


@pytest.mark.parametrize("option", ["text", "prompts", "task"])
def test_a_text_with_a_token_that_the_model_has_no_row_for_is_refused_by_file_and_key(
    run: Run, tmp_path: Path, option: str
) -> None:
    model = copy(TARGET, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 4096, "content": "<|im_start|>"})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    rows = [{"prompt": "<|im_start|>a", "question": "<|im_start|>a", "answer": "b"}] * 8
    (tmp_path / "asked").write_text("\n".join(map(json.dumps, rows)))
    words = [f"--{option} asked has '<|im_start|>', token 4096 in model/tokenizer.json", "vocab_size = 4096"]
    assert refuses(run("--model", "./model", f"--{option}", "asked"), *words)


def test_a_draft_of_other_padding_is_taken_and_without_a_tokenizer_it_is_refused(run: Run, tmp_path: Path) -> None:
    draft = copy(DRAFT, tmp_path / "draft")
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps({**config, "vocab_size": 5000}))
    with safe_open(draft / "model.safetensors", "numpy") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - no mapping
    rows = {name: [5000 if n == 4096 else n for n in shape] for name, shape in shapes.items()}
    save_file({name: np.zeros(shape, np.float16) for name, shape in rows.items()}, draft / "model.safetensors")
    options = ["plan", "--draft", "./draft", "--budget", "2GB", "--contexts", "64", "--space", "quick"]
    assert CliRunner().invoke(main, options).exit_code == 0
    (draft / "tokenizer.json").unlink()
    assert refuses(run("--draft", "./draft"), "--draft draft has a vocabulary of 5000", "the model has 4096", "put it")
    assert not (tmp_path / "results").exists()


def test_a_draft_with_other_tokens_is_refused(run: Run, tmp_path: Path) -> None:
    draft = copy(DRAFT, tmp_path / "draft")
    tokenizer = json.loads((draft / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert refuses(run("--draft", "./draft"), "--draft draft", "other tokens", "the model's tokenizer")


# A space, a text, prompts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[colour]\nchoices = [1]", ["unknown knob [colour]", "the knobs are weights"]),
        ("[weights]\nchoice = ['bf16']", ["unknown key weights.choice", "use choices"]),
        ("[weights]\nchoices = ['int3']", ["weights.choices has 'int3'", "bnb-nf4"]),
        ("[cache]\nchoices = []", ["cache.choices must be a list that holds something"]),
        ("[depth]\nlow = 4\nhigh = 2", ["depth.low and depth.high"]),
        ("[depth]\nchoices = [0]", ["depth has 0; it must be 1 to 16"]),
        ("[weights\n", ["is not valid TOML"]),
        ("[cache]\nchoices = ['offloaded']", ["no choice of [cache] can run here", "the device is the host already"]),
    ],
)
def test_a_search_space_that_cannot_be_read_names_the_file_or_the_knob(
    run: Run, tmp_path: Path, toml: str, words: list[str]
) -> None:
    (tmp_path / "mine.toml").write_text(toml)
    assert refuses(run("--space", "mine.toml"), *words, *([] if "offloaded" in toml else ["--space: mine.toml"]))


@pytest.mark.parametrize("name", ["nowhere.toml", "fastest"])
def test_a_search_space_that_does_not_exist_is_refused_with_those_that_do(run: Run, name: str) -> None:
    assert refuses(run("--space", name), f"no search space {name}", "default, published-8gb, quick, wide")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "is empty"), (b" \n\n", "is empty"), (b"\xff\xfe\x00", "is not UTF-8 text"), (b"a\0b", "is binary")],
)
def test_a_text_that_is_no_text_is_refused(run: Run, tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "my.txt").write_bytes(content)
    assert refuses(run("--text", "my.txt"), "--text my.txt", reason, "give a plain text file")


def test_a_text_that_cannot_be_read_is_refused(run: Run, tmp_path: Path) -> None:
    assert refuses(run("--text", "nowhere.txt"), "--text nowhere.txt cannot be read: No such file")
    assert refuses(run("--text", "."), "--text . cannot be read: Is a directory")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "a"}\n{"text": "b"}\n', ["line 2", 'write {"prompt": "text"}']),
        ("hello", ["line 1"]),
        ('{"prompt": ""}', ["line 1"]),
        ("[1]", ["line 1"]),
        ("\n", ["is empty"]),
    ],
)
def test_prompts_that_are_not_json_lines_name_the_line(
    run: Run, tmp_path: Path, content: str, words: list[str]
) -> None:
    (tmp_path / "my.jsonl").write_text(content)
    assert refuses(run("--prompts", "my.jsonl"), "--prompts my.jsonl", *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"question": "a", "answer": "b"}\n{"question": "b"}\n', ["line 2", '{"question": "text", "answer": "text"}']),
        ('{"question": "a", "answer": 4}', ["line 1"]),
        ('{"question": "", "answer": "b"}', ["line 1"]),
        ("[1]", ["line 1"]),
        ("\n", ["is empty"]),
    ],
)
def test_a_task_that_is_not_json_lines_names_the_line(run: Run, tmp_path: Path, content: str, words: list[str]) -> None:
    (tmp_path / "my.jsonl").write_text(content)
    assert refuses(run("--task", "my.jsonl"), "--task my.jsonl", *words)


def test_a_task_that_is_not_there_or_has_no_limit_is_refused(run: Run) -> None:
    assert refuses(run("--task", "nowhere.jsonl"), "--task nowhere.jsonl cannot be read")
    assert refuses(run("--max-task-loss", "-1"), "--max-task-loss", "write it like 5% or 0.05")


def test_a_task_and_its_limit_reach_the_workload(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n')
    words = ["--budget", "2GB", "--device", "cpu", "--task", str(path), "--max-task-loss", "2%"]
    options = main.commands["run"].make_context("run", words).params
    assert (request_of(options).workload.task, request_of(options).workload.max_task_loss) == (str(path), 0.02)


# Where it is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_run_folder_that_cannot_be_written_is_refused(run: Run, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("in the way")
    assert refuses(run("--out", out), f"--out {out} cannot be written: ")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    "url",
    ["nonsense", "mysterious://x", "sqlite:////nowhere/at/all.db", "sqlite:///text.txt", "postgresql://nowhere/x"],
)
def test_a_storage_that_cannot_be_opened_is_refused(run: Run, tmp_path: Path, url: str) -> None:
    (tmp_path / "text.txt").write_text("not a database " * 1000)
    assert refuses(run("--storage", url, "--out", "here"), f"storage {url} cannot be opened", "check --storage")
    assert (tmp_path / "text.txt").read_text() == "not a database " * 1000


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_run_folder_is_refused_and_left_as_it_is(run: Run, tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    assert refuses(run("--out", "."), "run.json", "--out")
    assert (tmp_path / "run.json").read_text() == content


def test_a_budget_under_the_smallest_prediction_is_answered_with_no_and_by_how_much(run: Run, tmp_path: Path) -> None:
    result = run("--budget", "100MiB")
    assert refuses(result, "--budget 100 MiB is ", " MiB under the smallest predicted footprint", "need about", code=1)
    assert not (tmp_path / "results").exists()


# report, export -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["report", "export"])
def test_a_folder_without_a_run_is_refused(command: str, tmp_path: Path) -> None:
    assert refuses(CliRunner().invoke(main, [command, str(tmp_path)]), "holds no run.json", "--out")
    assert refuses(CliRunner().invoke(main, [command, str(tmp_path / "nowhere")]), "holds no run.json", "--out")
    (tmp_path / "file").write_text("")
    assert refuses(CliRunner().invoke(main, [command, str(tmp_path / "file")]), "run.json cannot be read")
