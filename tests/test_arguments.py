"""Flags, JSON files of flags, the errors for those that are wrong, and flags that Transformers 5 has dropped."""

import dataclasses
import importlib
import json

import pytest
from conftest import BOTH, SCRIPTS, flags, make_model, read_json, run_script, sentences, write_lines

import run_mlm

NOTHING_GIVEN = []
# Values of arguments that do not work here; those that are not in it are switches.
OTHER_VALUES = {
    "debug": "underflow_overflow",
    "include_for_metrics": ["loss"],
    "label_names": ["labels"],
    "length_column_name": "size",
    "liger_kernel_config": {"rope": True},
    "train_sampling_strategy": "sequential",
}
# Documented flags of both scripts: type, default. `output_dir` has none: it is required.
SHARED = {
    "model_name_or_path": (str, None),
    "model_type": (str, None),
    "config_name": (str, None),
    "config_overrides": (str, None),
    "tokenizer_name": (str, None),
    "cache_dir": (str, None),
    "use_fast_tokenizer": (bool, True),
    "model_revision": (str, "main"),
    "token": (str, None),
    "use_auth_token": (bool, False),
    "dataset_name": (str, None),
    "dataset_config_name": (str, None),
    "train_file": (str, None),
    "validation_file": (str, None),
    "train_ref_file": (str, None),
    "validation_ref_file": (str, None),
    "text_column_name": (str, None),
    "overwrite_cache": (bool, False),
    "validation_split_percentage": (int, 5),
    "max_seq_length": (int, None),
    "preprocessing_num_workers": (int, None),
    "mlm_probability": (float, 0.15),
    "pad_to_max_length": (bool, False),
    "max_train_samples": (int, None),
    "max_val_samples": (int, None),
    "output_dir": (str, None),
    "overwrite_output_dir": (bool, False),
    "do_train": (bool, False),
    "do_eval": (bool, False),
    "gradient_accumulation_steps": (int, 1),
    "num_train_epochs": (float, 3.0),
    "max_steps": (int, -1),
    "learning_rate": (float, 5e-5),
    "weight_decay": (float, 0.0),
    "adam_beta1": (float, 0.9),
    "adam_beta2": (float, 0.999),
    "adam_epsilon": (float, 1e-8),
    "max_grad_norm": (float, 1.0),
    "warmup_steps": (int, 0),
    "label_smoothing_factor": (float, 0.0),
    "logging_steps": (int, 500),
    "seed": (int, 42),
}
ONE = {
    "run_mlm": {
        "line_by_line": (bool, False),
        "per_device_train_batch_size": (int, 8),
        "per_device_eval_batch_size": (int, 8),
    },
    "run_mlm_flax": {
        "line_by_line": (bool, True),
        "train_batch_size": (int, 8),
        "eval_batch_size": (int, 8),
        "lr_scheduler_type": (str, "constant * linear_warmup * rsqrt_decay"),
    },
}
EXAMPLES = {
    int: ("7", 7),
    float: ("0.25", 0.25),
    str: ("constant", "constant"),
}
ALIASES = {
    "max_eval_samples": "max_val_samples",
    "per_device_train_batch_size": "train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
}


def parse(script, argv):
    """Return all settings of a command line in one dictionary, without checks of how they go together."""
    groups = (script.ModelArguments, script.DataTrainingArguments, script.TrainingArguments)
    groups = script.ArgumentParser(groups).parse_args_into_dataclasses(argv, look_for_args_file=False)
    return settings_of(groups)


def settings_of(groups):
    """Return the fields of all groups in one dictionary."""
    return {item.name: getattr(group, item.name) for group in groups for item in dataclasses.fields(group)}


def parse_checked(script, argv):
    """Return all settings in one dictionary, through `parse_args`."""
    return settings_of(script.parse_args(argv))


@pytest.fixture
def required(text_files, tmp_path):
    """The settings that every run needs."""
    train_file, output_dir = text_files["train_file"], str(tmp_path / "o")
    return {"model_name_or_path": "some-model", "train_file": train_file, "output_dir": output_dir}


@pytest.fixture
def write_config(tmp_path):
    """A function that writes an object, or literal text, to a JSON file and returns its path."""

    def write(content):
        path = tmp_path / "arguments.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write


def test_documented_flags_have_their_defaults(script):
    documented = {**SHARED, **ONE[script.__name__]}
    settings = parse(script, NOTHING_GIVEN)
    assert {name: settings[name] for name in documented} == {name: default for name, (_, default) in documented.items()}


@pytest.mark.parametrize("name", ["train_file", "validation_file"])
def test_one_file_is_a_string_and_several_are_a_list(script, write_config, name):
    for given in ("a.txt", ["a.txt", "b.txt"]):
        argv = [f"--{name}", *([given] if isinstance(given, str) else given)]
        assert parse(script, argv)[name] == given
        assert parse(script, script.json_flags(write_config({name: given})))[name] == given
    assert parse(script, script.json_flags(write_config({name: ["a.txt"]})))[name] == "a.txt"


def test_documented_flags_have_their_types(script):
    for name, (kind, default) in {**SHARED, **ONE[script.__name__]}.items():
        if kind is bool:
            given = {value: parse(script, [f"--{name}", value])[name] for value in ("true", "false")}
            assert given == {"true": True, "false": False}, name
            assert parse(script, [f"--{name}"])[name] is True, name
            if default:
                assert parse(script, [f"--no_{name}"])[name] is False, name
        else:
            text, value = EXAMPLES[kind]
            parsed = parse(script, [f"--{name}", text])[name]
            assert parsed == value, name
            assert type(parsed) is kind or name == "warmup_steps", name  # In Transformers 5 also a share.


@pytest.mark.parametrize(("first", "second"), ALIASES.items())
def test_a_flag_has_two_names(script, first, second):
    before = parse(script, NOTHING_GIVEN)
    for name in (first, second):
        after = parse(script, [f"--{name}", "77"])
        assert {key for key, value in after.items() if value == 77 != before[key]} & {first, second}


def test_flags_a_file_and_a_file_with_flags_give_the_same_settings(script, required, write_config):
    from_flags = parse_checked(script, flags(**required, do_train=True, learning_rate=1e-3, max_seq_length=32))
    from_file = parse_checked(
        script, [write_config({**required, "do_train": True, "learning_rate": 1e-3, "max_seq_length": 32})]
    )
    wrong = write_config({**required, "do_train": False, "learning_rate": 5, "max_seq_length": 32})
    overridden = parse_checked(script, [wrong, *flags(do_train=True, learning_rate=1e-3)])
    for settings in (from_flags, from_file, overridden):
        assert (settings["do_train"], settings["learning_rate"], settings["max_seq_length"]) == (True, 1e-3, 32)
        settings.pop("logging_dir", None)  # Holds the time of day.
    assert from_flags == from_file == overridden


def test_null_in_a_file_is_the_default_and_false_is_false(script, required, write_config):
    null = {"mlm_probability": None, "max_seq_length": None}
    false = {"use_fast_tokenizer": False, "line_by_line": False}
    settings = parse_checked(script, [write_config({**required, **null, **false})])
    assert settings["mlm_probability"] == 0.15
    assert settings["max_seq_length"] is None
    assert settings["use_fast_tokenizer"] is False
    assert settings["line_by_line"] is False


def test_text_in_a_file_is_taken_literally(script, required, write_config):
    odd = {"cache_dir": "a folder/with = and --dashes", "text_column_name": "--text", "tokenizer_name": "Größe 字"}
    settings = parse_checked(script, [write_config({**required, **odd})])
    assert {name: settings[name] for name in odd} == odd


PATHS = "model_name_or_path tokenizer_name config_name cache_dir new_tokens output_dir resume_from_checkpoint"
PATHS += " train_ref_file validation_ref_file"


@pytest.mark.parametrize("in_a_file", [False, True])
def test_a_tilde_is_the_users_folder_in_every_path(script, write_config, tmp_path, monkeypatch, in_a_file):
    def paths(home):
        files = {name: [f"{home}/{name}{i}.txt" for i in range(2)] for name in ("train_file", "validation_file")}
        return {**{name: f"{home}/{name} ~" for name in PATHS.split()}, **files}

    monkeypatch.setenv("HOME", str(tmp_path))
    expected, given = paths(tmp_path), paths("~")
    for path in expected["train_file"] + expected["validation_file"]:
        write_lines(path, ["the baker ."])
    arguments = [write_config(given)] if in_a_file else []
    for name, value in () if in_a_file else given.items():
        arguments += [f"--{name}", *(value if isinstance(value, list) else [value])]
    settings = parse_checked(script, [*arguments, "--line_by_line", "true", "--do_train"])
    assert {name: settings[name] for name in expected} == expected
    settings = parse_checked(script, flags(model_name_or_path="m", dataset_name="~/set", output_dir="~"))
    assert (settings["dataset_name"], settings["output_dir"]) == (str(tmp_path / "set"), str(tmp_path))


def test_lists_and_nested_objects_in_a_file_reach_the_trainer(required, write_config):
    run_mlm = importlib.import_module("run_mlm")
    path = write_config(
        {**required, "report_to": ["tensorboard", "tensorboard"], "lr_scheduler_kwargs": {"num_cycles": 2}}
    )
    settings = parse_checked(run_mlm, [path])
    assert settings["report_to"] == ["tensorboard", "tensorboard"]
    assert settings["lr_scheduler_kwargs"] == {"num_cycles": 2}
    assert parse_checked(run_mlm, [path, "--report_to", "tensorboard"])["report_to"] == ["tensorboard"]


@pytest.mark.flax
def test_one_file_serves_both_scripts(required, write_config):
    content = {
        **required,
        "do_train": True,
        "do_eval": True,
        "line_by_line": True,
        "train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "max_eval_samples": 5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 3,
        "model_revision": "v1",
        "use_auth_token": True,
    }
    path = write_config(content)
    torch_groups, flax_groups = (importlib.import_module(name).parse_args([path]) for name in SCRIPTS)
    for torch_group, flax_group in zip(torch_groups[:2], flax_groups[:2]):
        assert dataclasses.asdict(torch_group) == dataclasses.asdict(flax_group)
    torch_args, flax_args = torch_groups[2], flax_groups[2]
    assert (torch_args.per_device_train_batch_size, torch_args.per_device_eval_batch_size) == (4, 2)
    assert (flax_args.train_batch_size, flax_args.eval_batch_size) == (4, 2)
    assert torch_args.lr_scheduler_type == flax_args.lr_scheduler_type == "linear"
    assert torch_args.warmup_steps == flax_args.warmup_steps == 3


def test_a_value_without_a_flag_is_named(script, required, capsys):
    with pytest.raises(SystemExit):
        script.main([*flags(**required), "bert-base-cased"])
    assert "bert-base-cased" in capsys.readouterr().err


def test_an_abbreviated_flag_is_refused(script, required):
    with pytest.raises(script.UserError, match=r"--learning_r; did you mean --learning_rate"):
        script.parse_args(flags(**required, learning_r=1e-3))


def test_a_token_is_not_printed_with_the_settings(script, required):
    model_args, _, _ = script.parse_args(flags(**required, token="hf_secret"))
    assert model_args.token == "hf_secret"
    assert "hf_secret" not in repr(model_args)


def test_debugging_shows_the_traceback(script, monkeypatch):
    monkeypatch.setenv("MLM_DEBUG", "1")
    with pytest.raises(script.UserError, match="--output_dir"):
        script.main([])


@pytest.mark.parametrize("name", BOTH)
def test_help_lists_every_documented_flag(name, tmp_path):
    done = run_script(name, ["--help"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for flag in (*SHARED, *ONE[name], *ALIASES, *ALIASES.values()):
        assert f"--{flag} " in done.stdout, flag


STEPS = 8


@pytest.fixture
def run(tmp_path, capfd):
    """Return a function that trains a few steps in the folder `output` and returns (learning rates, error output)."""
    folder = make_model(tmp_path / "model", num_hidden_layers=1)
    settings = {"model_name_or_path": folder, "train_file": write_lines(tmp_path / "train.txt", sentences(40))}
    settings |= {"output_dir": tmp_path / "output", "do_train": True, "max_steps": STEPS, "max_seq_length": 16}
    settings |= {"logging_steps": 1, "lr_scheduler_type": "constant_with_warmup", "learning_rate": 1.0}

    def train(**changes):
        try:
            run_mlm.main(train.arguments(**changes))
        except SystemExit as stopped:
            assert stopped.code == 2
            return [], capfd.readouterr().err
        history = read_json(tmp_path, "output", "trainer_state.json")["log_history"]
        return [entry["learning_rate"] for entry in history if "learning_rate" in entry], ""

    train.arguments = lambda **changes: flags(**settings | changes)
    return train


@pytest.mark.parametrize("warmup_steps", [4, 0.5])  # A number of steps, or a share of all of them.
def test_warmup(run, warmup_steps):
    rates, _ = run(report_to="none", warmup_steps=warmup_steps)
    assert rates == pytest.approx([step / 4 if step < 4 else 1 for step in range(STEPS)])


@pytest.mark.parametrize("task", ["do_train", "do_eval"])
def test_events_are_below_the_output_otherwise(run, tmp_path, monkeypatch, task):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    settings = {"do_train": "false", "validation_file": tmp_path / "train.txt"} if task == "do_eval" else {}
    settings |= {task: True, "learning_rate": 1e-3, "report_to": "tensorboard"}
    run_mlm.main(run.arguments(**settings))
    assert list((tmp_path / "work").iterdir()) == []
    (events,) = (tmp_path / "output" / "runs").rglob("events.out.*")
    assert events.stat().st_size > 100


def test_overwriting_the_output(run, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "notes.txt").write_text("mine")
    assert "--overwrite_output_dir" in run(report_to="none")[1]
    rates, _ = run(report_to="none", overwrite_output_dir=True)
    assert len(rates) == STEPS


# Flags of former releases of Transformers that this one has dropped.
FORMER = [
    ("evaluation_strategy", "--eval_strategy", "--eval_strategy"),
    ("warmup_ratio", "--warmup_steps", "--warmup_steps"),
    ("per_gpu_train_batch_size", "--per_device_train_batch_size", "--per_device_train_batch_size"),
    ("push_to_hub_token", "--hub_token", "--hub_token"),
    ("no_cuda", "--use_cpu", None),
    ("adafactor", "--optim", None),
    ("logging_dir", "nothing, logs are in --output_dir", "nothing, logs are in --output_dir"),
    ("save_safetensors", "nothing, weights are always safetensors", "nothing, weights are always safetensors"),
]


@pytest.mark.parametrize(("flag", "instead", "in_flax"), FORMER)
def test_a_flag_that_transformers_has_dropped_names_the_new_one(script, flag, instead, in_flax):
    instead = instead if script.__name__ == "run_mlm" else in_flax
    with pytest.raises(script.UserError) as caught:
        script.parse_args(flags(model_name_or_path="m", output_dir="o", train_file=__file__, **{flag: 1}))
    message = f"unknown argument --{flag}"
    assert str(caught.value) == (f"{message}; instead: {instead}" if instead else message)


@pytest.mark.pytorch
@pytest.mark.parametrize("name", " ".join(run_mlm.UNUSABLE.values()).split())
def test_an_argument_of_the_trainer_that_does_not_work_here_is_named(name):
    value = OTHER_VALUES[name] if name in OTHER_VALUES else not getattr(run_mlm.TrainingArguments, name)
    with pytest.raises(run_mlm.UserError, match=f"^--{name} does not work here: "):
        run_mlm.TrainingArguments(output_dir="o", **{name: value})
