"""The command line: what it says, what it returns, what it does not import."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from silotune.components.errors import QuorumError
from silotune.components.federation import Federation
from silotune.pipelines import engines

HEAVY = ("torch", "transformers", "peft", "mlflow", "kfp")


def imported(*words: object, forbidden: tuple[str, ...]) -> list[str]:
    """Which of ``forbidden`` a command imports, in a process of its own."""
    code = "\n".join(
        [
            "import atexit, sys",
            f"atexit.register(lambda: print('IMPORTED', *[m for m in {forbidden!r} if m in sys.modules]))",
            f"sys.argv = ['silotune', *{[str(w) for w in words]!r}]",
            "from silotune.pipelines.cli import main",
            "main()",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.rsplit("IMPORTED", 1)[1].split()


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["run", "--help"]])
def test_help_imports_nothing_heavy(words):
    pydantic = () if "run" in words else ("pydantic",)  # typer itself reads the types of a command's options with it
    assert imported(*words, forbidden=(*HEAVY, "boto3", "yaml", "numpy", *pydantic)) == []


@pytest.mark.parametrize("words", [["check"], ["check", "--data"], ["status"], ["status", "--json"]])
def test_check_and_status_import_nothing_heavy(federation, two_rounds, words):
    assert imported(*words, federation.file, forbidden=(*HEAVY, "boto3", "numpy")) == []


def test_version(silotune):
    from importlib.metadata import version

    assert silotune("--version") == (0, f"silotune {version('silotune')}\n", "")


def test_unknown_command_is_2(silotune):
    assert silotune("walk")[0] == 2


def test_new_writes_a_valid_file_once(silotune, tmp_path):
    code, out, _ = silotune("new", tmp_path / "My Hospitals!")
    file = tmp_path / "My Hospitals!" / "federation.yaml"
    assert (code, Federation.load(file).name) == (0, "my-hospitals")
    assert str(file) in out

    file.write_text("precious")
    code, _, err = silotune("new", file.parent)
    assert (code, file.read_text()) == (2, "precious")
    assert "exists already" in err


def test_new_shows_the_defaults_that_hold(silotune, tmp_path):
    """What the starter spells out and the schema has a default for must not drift apart unseen."""
    silotune("new", tmp_path / "x")
    told = yaml.safe_load((tmp_path / "x" / "federation.yaml").read_text())
    loaded = Federation.load(tmp_path / "x" / "federation.yaml")
    assert loaded.communication.codec == told["communication"]["codec"] == "float32"
    assert loaded.training.steps == told["training"]["steps"] == 50


def test_new_into_a_file_is_an_error(silotune, tmp_path):
    (tmp_path / "x").write_text("")
    assert silotune("new", tmp_path / "x")[0] == 2


def test_schema_describes_the_file(silotune):
    code, out, _ = silotune("schema")
    assert (code, json.loads(out)["properties"]["silos"]["type"]) == (0, "array")


def test_check_says_what_the_federation_is(silotune, federation):
    code, out, err = silotune("check", federation.file)
    assert (code, err) == (0, "")
    for piece in ("north", "quorum 2 of 3", "q_proj", "no round of it yet"):
        assert piece in out


def test_check_says_what_is_promised_about_records_and_what_is_not(silotune, federation):
    assert "none for single records" in silotune("check", federation.file)[1]
    federation.file.write_text(federation.file.read_text() + "privacy: {epsilon: 3, delta: 1e-6}\n")
    out = " ".join(silotune("check", federation.file)[1].split())
    assert "epsilon 3 at delta 1e-06 for a record, over 3 rounds" in out
    assert "not covered: scores on valid and test records" in out


def test_check_warns_of_a_bound_that_so_few_silos_cannot_steer(silotune, federation):
    text = federation.file.read_text()
    for clip, told in (("quantile: 0.5", True), ("norm: 0.5", False)):
        federation.file.write_text(text + f"aggregation: {{weights: uniform, clip: {{{clip}}}}}\nprivacy: {{silo: {{epsilon: 3}}}}\n")
        out = " ".join(silotune("check", federation.file)[1].split())
        assert "epsilon 3 at delta 1e-05 for a silo's part, over 3 rounds, by gaussian noise" in out
        assert (
            "with 3 silos and this epsilon tells up from down by 0.68 standard deviations over all rounds, 2.5 are needed" in out
        ) == told
        assert ("set aggregation.clip.norm" in out) == told


def test_every_problem_is_told_without_traceback(silotune, federation):
    federation.file.write_text(federation.file.read_text().replace("total: 3", "total: 0") + "epochs: 3\n")
    code, _, err = silotune("check", federation.file)
    assert code == 2
    assert "rounds.total" in err
    assert "epochs: unknown key" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["check", "run", "status", "sync", "ui"])
def test_missing_file_is_2_everywhere(silotune, tmp_path, command):
    code, _, err = silotune(command, tmp_path / "no.yaml")
    assert (code, "no such federation file" in err) == (2, True)


def test_check_refuses_a_base_without_tokenizer(silotune, federation):
    (Path(federation.model.base) / "tokenizer.json").unlink()
    code, _, err = silotune("check", federation.file)
    assert (code, "holds no tokenizer" in err) == (2, True)


def test_help_lists_every_command_with_its_whole_first_sentence(silotune):
    _, out, _ = silotune("--help")
    told = " ".join(out.split())
    assert "..." not in out.split("ARGS]...")[1]
    assert "Others:" not in out, "a command has no section"
    assert "check Check a federation file, and say what an edit of it would mean run Run" in told


def test_a_folder_is_told_which_file_to_name(silotune, federation):
    (federation.file.parent / "federation.yaml").write_text("")
    code, _, err = silotune("status", federation.file.parent)
    assert code == 2
    assert "is a folder; name the federation file in it," in err
    assert "/federation.yaml" in err


def test_ui_of_what_is_not_tracked(silotune, make_federation):
    code, _, err = silotune("ui", make_federation())  # tracking.uri: none
    assert code == 2
    assert "is none, so that nothing is tracked" in err


def test_check_data_counts_records(silotune, federation):
    code, out, _ = silotune("check", federation.file, "--data")
    assert (code, "north train: 3 records" in out) == (0, True)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "holds no record"),
        (b'{"prompt": "a", "response": "b"}\n[1]\n', "line 2: must be a JSON object"),
        (b"\n\xff\n", "line 2: not UTF-8"),
    ],
)
def test_check_data_names_file_and_line_of_every_silo(silotune, federation, content, told):
    for silo in ("north", "west"):
        (federation.file.parent / f"{silo}.jsonl").write_bytes(content)
    code, out, err = silotune("check", federation.file, "--data")
    assert code == 2
    assert err.count(told) == 2
    assert "west train: west.jsonl" in err
    assert "south train: 3 records" in out


def test_check_tokens_tells_what_would_be_lost(silotune, make_federation):
    file = make_federation(data={"max_length": 48})
    (file.parent / "data" / "north" / "train.jsonl").write_text('{"prompt": "' + "why? " * 40 + '", "response": "so"}\n')
    code, out, err = silotune("check", file, "--tokens")
    assert code == 2
    assert "no example fits data.max_length=48" in err
    assert "prompts alone are longer" in err
    assert re.search(r"south train: 17 records, \d+ cut at 48 tokens", out)


def edit(federation, old, new):
    text = federation.file.read_text()
    assert old in text
    federation.file.write_text(text.replace(old, new))


def test_an_unchanged_file_and_a_free_edit_change_no_terms(silotune, federation, two_rounds):
    assert "the terms are those agreed on" in silotune("check", federation.file)[1]
    edit(federation, "total: 3", "total: 30")
    code, out, _ = silotune("check", federation.file)
    assert (code, "the terms are those agreed on" in out) == (0, True)


def test_an_amendment_is_told_with_old_and_new(silotune, federation, two_rounds):
    edit(federation, "steps: 4", "steps: 5")
    edit(federation, "  - {id: west, train: ./west.jsonl}\n", "")
    code, out, _ = silotune("check", federation.file)
    assert code == 0
    for piece in ("holds from round 3 on", "training.steps: 4 → 5", "silos.west: leaves"):
        assert piece in out


def test_an_amendment_of_an_open_round_says_what_it_costs(silotune, federation, two_rounds):
    two_rounds.open(3)
    edit(federation, "steps: 4", "steps: 5")
    assert "closes open round 3 without a result, and holds from round 4 on" in silotune("check", federation.file)[1]


def test_another_model_is_another_federation(silotune, federation, two_rounds):
    edit(federation, "r: 2", "r: 3")
    (Path(federation.model.base) / "model.safetensors").write_text("other weights")
    code, _, err = silotune("check", federation.file)
    assert code == 2
    for piece in ("model.lora.r: 2 → 3", "base: ", "new name"):
        assert piece in err


def test_status_for_people_and_machines(silotune, federation, two_rounds):
    code, out, _ = silotune("status", federation.file)
    assert code == 0
    for piece in ("3.2500 (2 silos)", "round 2: west: failed: disk full", "exported to /models/2"):
        assert piece in out
    code, out, _ = silotune("status", federation.file, "--json")
    assert (code, [r["round"] for r in json.loads(out)["rounds"]]) == (0, [0, 1, 2])


def test_status_of_nothing(silotune, federation):
    code, out, _ = silotune("status", federation.file)
    assert (code, "no round is committed" in out) == (0, True)


def test_compile_writes_ir(silotune, federation, tmp_path):
    out = tmp_path / "made" / "p.yaml"
    code, told, _ = silotune("compile", federation.file, "-o", out, "--rounds", 2)
    assert (code, "3 silos, 2 rounds" in told) == (0, True)
    assert next(yaml.safe_load_all(out.read_text()))["pipelineInfo"]["name"] == "silotune-hand"


def test_compile_refuses_what_no_run_can_hold(silotune, federation, tmp_path):
    code, _, err = silotune("compile", federation.file, "-o", tmp_path / "p.yaml", "--rounds", 100)
    assert (code, "per_run" in err) == (2, True)
    assert silotune("compile", federation.file, "-o", tmp_path / "p.json")[0] == 2


def test_sync_before_the_first_round_is_2(silotune, federation):
    assert silotune("sync", federation.file)[0] == 2


@pytest.mark.parametrize(("scored", "complete"), [(("north", "south"), False), (("north", "south", "west"), True)])
def test_sync_is_complete_when_every_silo_has_scored_the_last_global(silotune, federation, hand, monkeypatch, scored, complete):
    from silotune.components import tracking

    hand.commit(0)
    hand.evaluate(0, dict.fromkeys(scored, 1.0))
    monkeypatch.setattr(tracking, "sync", lambda federation, rounds, *, complete: f"run-{complete}")
    assert silotune("sync", federation.file) == (0, f"run-{complete}\n", "")


def test_ui_of_a_server_is_its_address(silotune, federation):
    federation.file.write_text(federation.file.read_text() + "tracking: {uri: 'http://mlflow:5000'}\n")
    assert silotune("ui", federation.file) == (0, "MLflow is at http://mlflow:5000\n", "")


def test_ui_of_a_file(silotune, federation, monkeypatch):
    assert silotune("ui", federation.file)[0] == 2  # nothing tracked yet
    database = federation.file.parent / ".silotune" / "mlflow.db"
    database.parent.mkdir()
    database.touch()
    ran = []

    def execv(program, words):
        ran.append((words, os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"], os.getcwd()))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "true")
    monkeypatch.chdir(federation.file.parent)
    silotune("ui", federation.file, "--port", 5055)
    ((words, jobs, folder),) = ran
    assert words[1:4] == ["-m", "mlflow", "ui"]
    assert f"sqlite:///{database}" in words
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--port") + 1] == "5055"
    assert (jobs, folder) == ("false", str(database.parent))


class FakeRun:
    """What engines.start returns, without a process."""

    def __init__(self, folder, result, running=()):
        self.folder, self.log = folder, folder / "run.log"
        self._result, self._running = result, iter(running)
        self.stopped = False

    def running(self):
        return next(self._running, False)

    def stop(self):
        self.stopped = True

    def result(self):
        return self._result


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Runs asked for, as (slots, warm); what they come to is set by ``result``."""
    asked = SimpleNamespace(runs=[], result={"exit_code": 0, "message": "", "output": ""}, events=[])

    def start(federation, rounds, *, warm):
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in asked.events))
        asked.runs.append((rounds, warm))
        return FakeRun(tmp_path, asked.result)

    monkeypatch.setattr(engines, "start", start)
    return asked


def test_run_works_on_all_rounds_that_are_left(silotune, federation, hand, fake):
    hand.commit(0)
    hand.commit(1)
    hand.commit(2, (), outcome="amended")
    silotune("run", federation.file)
    silotune("run", federation.file, "--rounds", 1, "--no-warm")
    silotune("run", federation.file, "--rounds", 9)
    assert fake.runs == [(2, True), (1, False), (2, True)]


def test_run_works_on_per_run_rounds_by_default(silotune, federation, hand, fake):
    edit(federation, "total: 3", "total: 3, per_run: 1")
    silotune("run", federation.file)
    assert fake.runs == [(1, True)]


def test_run_of_a_complete_federation_starts_nothing(silotune, federation, two_rounds, fake):
    edit(federation, "total: 3", "total: 2")
    code, out, _ = silotune("run", federation.file)
    assert (code, fake.runs) == (0, [])
    for piece in ("nothing left to do", "/models/2", f"silotune ui {federation.file}", "5.2500"):
        assert piece in out


def test_run_of_a_complete_federation_without_its_export_makes_it(silotune, federation, two_rounds, fake):
    edit(federation, "total: 3", "total: 2")
    federation.file.write_text(federation.file.read_text() + "export: {merge: true}\n")
    silotune("run", federation.file)
    assert fake.runs == [(0, True)]


def test_a_converged_federation_goes_on_once_until_is_taken_out(silotune, federation, hand, fake):
    hand.commit(0)
    hand.export(hand.commit(1, converged=True))
    silotune("run", federation.file)
    assert fake.runs == [(2, True)]
    edit(federation, "total: 3", "total: 3, until: {patience: 1}")
    assert "nothing left to do" in silotune("run", federation.file)[1]
    assert fake.runs == [(2, True)]


def test_a_failed_run_keeps_its_exit_code_and_tells_who_is_missing(silotune, federation, hand, fake):
    fake.result = {"exit_code": QuorumError.exit_code, "message": "to begin, 2 of 3 silos must deliver", "output": ""}
    fake.events = [
        {"at": 1.0, "box": "preprocess", "what": "started", "silo": "west"},
        {"at": 2.0, "box": "preprocess", "what": "ended", "silo": "west", "status": "west failed: disk full", "detail": "/srv is full",
         "seconds": 1.0},
    ]  # fmt: skip
    code, out, err = silotune("run", federation.file)
    assert code == 3
    assert "west: preprocess failed: /srv is full" in out
    assert "2 of 3 silos must deliver" in err
    assert f"silotune run {federation.file}" in err


def test_a_wrong_file_is_not_told_to_run_again(silotune, federation, fake):
    fake.result = {"exit_code": 2, "message": "no such module", "output": ""}
    code, _, err = silotune("run", federation.file)
    assert (code, err.strip().endswith("no such module")) == (2, True)


def test_an_unforeseen_end_names_the_log(silotune, federation, fake, tmp_path):
    fake.result = {"exit_code": 1, "message": "unexpected KeyError", "output": ""}
    code, _, err = silotune("run", federation.file)
    assert (code, str(tmp_path / "run.log") in err) == (1, True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_first(silotune, federation, monkeypatch, tmp_path, number, code):
    going = FakeRun(tmp_path, {}, running=[True] * 1000)
    monkeypatch.setattr(engines, "start", lambda *_, **__: going)
    monkeypatch.setattr(time, "sleep", lambda _: os.kill(os.getpid(), number))
    before = signal.getsignal(signal.SIGINT)
    try:
        got, _, err = silotune("run", federation.file)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (got, going.stopped) == (code, True)
    assert f"silotune run {federation.file}" in err


def test_a_second_run_of_the_same_file_is_refused(silotune, federation, monkeypatch):
    """The lock is held by the run's own process: it lasts as long as that, whoever started it."""
    real = subprocess.Popen

    def sleeper(words, **options):
        return real([sys.executable, "-c", "import sys; sys.stdin.read()"], **options)

    monkeypatch.setattr(engines.subprocess, "Popen", sleeper)
    first = engines.start(federation, 1)
    try:
        code, _, err = silotune("run", federation.file)
        assert (code, "is going on" in err) == (4, True)
    finally:
        first.stop()
    engines.start(federation, 1).stop()
