"""Job files that are wrong, and what is said about them."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from dfmpc.errors import JobFileError
from dfmpc.job.document import MAX_ALIASES, MAX_BYTES
from dfmpc.job.loader import LoadedJob, load_job

PLANS = "bit_plans: [{name: rtn4, method: rtn, bits: 4}]\n"
HEAD = "version: 1\nname: test\noutput: store\n"
MODELS = "models: [{program: a.pt2}]\n"


def write(folder: Path, text: str) -> Path:
    file = folder / "job.yaml"
    file.write_text(textwrap.dedent(text))
    return file


def load(folder: Path, text: str) -> LoadedJob:
    return load_job(write(folder, text))


def problems(folder: Path, text: str, **options: object) -> list[tuple[int | None, str, str, str]]:
    file = write(folder, text)
    with pytest.raises(JobFileError) as caught:
        load_job(file, **options)
    assert caught.value.exit_code == 2
    assert all(line.startswith(f"{file}: ") for line in str(caught.value).splitlines())
    return [(found.line, found.field, found.value, found.expected) for found in caught.value.problems]


def test_a_good_file_gives_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "jobs").mkdir()
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "jobs", HEAD + MODELS + PLANS)
    loaded = load_job(Path("jobs/job.yaml"))
    assert loaded.path == tmp_path / "jobs" / "job.yaml"
    assert loaded.folder == tmp_path / "jobs"
    assert loaded.store == tmp_path / "store"
    assert load_job(Path("jobs/job.yaml"), output="other").store == tmp_path / "other"
    assert load_job(Path("jobs/job.yaml"), output="/data/x").store == Path("/data/x")


def test_sizes_durations_and_calibrator_names_are_understood(tmp_path: Path):
    job = load(
        tmp_path,
        HEAD
        + MODELS
        + "bit_plans: [{name: a, method: dfmpc, calibrator: norm}]\n"
        + "resources: {host_memory: 1.5 GiB, task_timeout: 30m, devices: [cuda:0, cuda:2]}\n",
    ).job
    assert job.resources.host_memory == 1.5 * 2**30
    assert job.resources.task_timeout == 1800
    assert job.resources.devices == ["cuda:0", "cuda:2"]
    assert job.bit_plans[0].calibrator.name == "norm"


@pytest.mark.parametrize(
    ("text", "line", "field", "value", "expected"),
    [
        ("bit_plans: [{name: p, method: rtn, bits: 9}]", 5, "bit_plans[0].bits", "9", "less than or equal to 8"),
        ("bit_plans: [{name: p, method: rtn, bits: four}]", 5, "bit_plans[0].bits", "'four'", "valid integer"),
        ("bit_plans: [{name: p, method: rtn}]", 5, "bit_plans[0].bits", "nothing", "required"),
        ("bit_plans: [{name: p, bits: 4}]", 5, "bit_plans[0].method", "nothing", "'daq', 'dfmpc', 'dfq', 'hqq'"),
        ("bit_plans: [{name: p, method: nope}]", 5, "bit_plans[0].method", "'nope'", "'dfmpc', 'rtn', 'twn-exact'"),
        ("bit_plans: []", 5, "bit_plans", "[]", "at least 1 item"),
        ("bit_plans: 3", 5, "bit_plans", "3", "list"),
        ("bit_plans:\n  - name: p\n    method: dfmpc\n    lwo: 3", 8, "bit_plans[0].lwo", "an unknown field", "'low'"),
        (
            "bit_plans: [{name: p, method: dfmpc, calibrator: analitic}]",
            5,
            "bit_plans[0].calibrator",
            "'analitic'",
            "'none', 'norm', 'analytic'",
        ),
        (
            "bit_plans: [{name: p, method: dfmpc, calibrator: {rho: 1}}]",
            5,
            "bit_plans[0].calibrator.name",
            "nothing",
            "'analytic', 'none', 'norm'",
        ),
        (
            "bit_plans: [{name: p, method: dfmpc, calibrator: {name: analytic, rho: 3}}]",
            5,
            "bit_plans[0].calibrator.rho",
            "3",
            "less than or equal to 1",
        ),
        (
            "bit_plans: [{name: p, method: dfmpc, calibrator: {name: analytic, roh: 0.3}}]",
            5,
            "bit_plans[0].calibrator.roh",
            "an unknown field",
            "'rho'",
        ),
        (
            "bit_plans: [{name: p, method: dfmpc, granularity: {low: group:7}}]",
            5,
            "bit_plans[0].granularity.low",
            "'group:7'",
            "multiple of 8",
        ),
        ("bit_plans: [{name: p, method: dfmpc, lambda1: .inf}]", 5, "bit_plans[0].lambda1", "inf", "finite"),
        (PLANS + "resources: {treads: 2}", 6, "resources.treads", "an unknown field", "'threads'"),
        (PLANS + "resources: {task_timeout: soon}", 6, "resources.task_timeout", "'soon'", "such as 30m"),
        (PLANS + "resources: {host_memory: 16GB}", 6, "resources.host_memory", "'16GB'", "such as 16GiB"),
        (PLANS + "gates: 3", 6, "gates", "3", "a mapping with max_top1_drop, min_agreement"),
        (PLANS + "layers: [{match: conv1}]", 6, "layers[0]", "the fields match", "bits, granularity or both, or keep"),
        (PLANS + "colour: red", 6, "colour", "an unknown field", "one of version, name, output"),
        (PLANS + "evaluate: {data: job.yaml, mean: [0, 0, 0]}", 6, "evaluate", "the fields data, mean", "together"),
        (PLANS + "evaluate: {data: job.yaml, std: [1, 0, 1], mean: [0, 0, 0]}", 6, "evaluate.std[1]", "0", "than 0"),
        (PLANS + "evaluate: {data: no.parquet}", 6, "evaluate.data", "'no.parquet', which is no file", "job file's"),
        (PLANS + "include: [{model: b}]", 6, "include[0]", "{model: b, plan: *}", "models (a) and plans (rtn4)"),
        (PLANS + "exclude: [{plan: mp*}]", 6, "exclude[0]", "{model: *, plan: mp*}", "models (a) and plans (rtn4)"),
        (PLANS + "exclude: [{model: a}]", 6, "exclude", "leave no task", "at least one"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, text: str, line: int, field: str, value: str, expected: str):
    found = problems(tmp_path, HEAD + MODELS + text + "\n")
    assert len(found) == 1, found
    assert found[0][:2] == (line, field)
    assert value in found[0][2]
    assert expected in found[0][3]


@pytest.mark.parametrize(
    ("model", "field", "expected"),
    [
        ("{}", "models[0]", "exactly one of factory, program, glob, registry, mlflow; got none"),
        ("{program: a.pt2, glob: b}", "models[0]", "registry, mlflow; got program, glob"),
        ("{factory: 'a:b'}", "models[0]", "name, checkpoint, input beside factory"),
        ("{program: a.pt2, input: [1, 3]}", "models[0]", "no input without a factory"),
        ("{name: x, glob: '*.pt2'}", "models[0]", "no name beside glob"),
        ("{name: a/b, program: a.pt2}", "models[0].name", "letters, digits"),
        ("{name: .., program: a.pt2}", "models[0].name", "no '..'"),
        ("{name: a..b, program: a.pt2}", "models[0].name", "no '..'"),
        ("{name: .hidden, program: a.pt2}", "models[0].name", "no '.' in front"),
        ("{name: 'a\\b', program: a.pt2}", "models[0].name", "letters, digits"),
        ("{name: '', program: a.pt2}", "models[0].name", "1 to 128"),
        ("{program: 'a b.pt2'}", "models[0].program", "letters, digits"),
        ("{name: x, factory: os.system, checkpoint: c, input: [1, 3]}", "models[0].factory", "module:callable"),
        ("{name: x, factory: 'a:b', checkpoint: 'http://h/c', input: [1, 3]}", "models[0].checkpoint", "package://"),
        ("{name: x, factory: 'a:b', checkpoint: 'package://n/../c', input: [1, 3]}", "models[0].checkpoint", "'..'"),
        ("{name: x, factory: 'a:b', checkpoint: c, input: [1, 0]}", "models[0].input[1]", "greater than 0"),
        ("{glob: 'none/**/*.pt2'}", "models[0].glob", "a pattern of .pt2 files"),
    ],
)
def test_a_wrong_model_is_named(tmp_path: Path, model: str, field: str, expected: str):
    found = problems(tmp_path, HEAD + f"models:\n  - {model}\n" + PLANS)
    assert len(found) == 1, found
    assert found[0][:2] == (5, field)
    assert expected in found[0][3]


def test_all_problems_come_at_once_in_the_order_of_the_file(tmp_path: Path):
    found = problems(
        tmp_path,
        """\
        version: 1
        name: test
        output: store
        models:
          - {program: a.pt2}
          - {name: a, program: b.pt2}
          - glob: none/*.pt2
        bit_plans:
          - {name: p, method: dfmpc, low: 1}
          - {name: p, method: rtn, bits: 4}
        evaluate: {data: "${DFMPC_TEST_UNSET}/x"}
        sede: 1
        """,
    )
    assert [problem[:2] for problem in found] == [
        (6, "models[1].name"),
        (7, "models[2].glob"),
        (9, "bit_plans[0].low"),
        (10, "bit_plans[1].name"),
        (11, "evaluate.data"),
        (12, "sede"),
    ]
    assert found[0][3] == "a name used once: models[0] has it already"
    assert found[4][3] == "the environment variable DFMPC_TEST_UNSET to be set"


def test_names_of_a_glob_that_clash_are_errors(tmp_path: Path):
    for name in ("a/b.pt2", "a__b.pt2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (found,) = problems(tmp_path, HEAD + "models: [{glob: '**/*.pt2'}]\n" + PLANS)
    assert found[1] == "models[0].glob"
    assert "'a__b'" in found[2]
    assert "a/b.pt2" in found[3] + found[2]


def test_environment_variables_fill_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DFMPC_TEST_NIGHT", "monday")
    loaded = load(tmp_path, HEAD.replace("store", "/s/${DFMPC_TEST_NIGHT}-${DFMPC_TEST_NIGHT}") + MODELS + PLANS)
    assert loaded.store == Path("/s/monday-monday")


def test_a_factory_outside_the_allow_list_is_refused(tmp_path: Path):
    text = HEAD + "models:\n  - {name: x, factory: 'os:system', checkpoint: c, input: [1, 3]}\n" + PLANS
    assert write(tmp_path, text)
    (found,) = problems(tmp_path, text, allows=lambda factory: factory.startswith("timm"))
    assert found[:3] == (5, "models[0].factory", "'os:system'")
    assert "--allow-code" in found[3]
    assert load_job(write(tmp_path, text), allows=lambda _: True).job.models[0].factory == "os:system"


def test_missing_model_files_are_no_errors_of_the_job(tmp_path: Path):
    loaded = load(tmp_path, HEAD + "models: [{program: not/there.pt2}]\n" + PLANS)
    assert loaded.job.models[0].program == "not/there.pt2"


@pytest.mark.parametrize(
    ("content", "line", "value"),
    [
        (b"", None, "an empty file"),
        (b"# only a comment\n", None, "an empty file"),
        (b"- 1\n", 1, "a list"),
        (b"hello\n", 1, "the text 'hello'"),
        (b"a: [1\nb: 2\n", 2, "expected ',' or ']'"),
        (b"a: 1\n---\nb: 2\n", 2, "another document"),
        (b"name: !!python/object/apply:os.system [touch pwned]\n", 1, "could not determine a constructor"),
        (b"a: 1\nb: \xff\n", 2, "not UTF-8"),
        (b"name: 2026-13-45\n", None, "month must be in 1..12"),
        (b"a: 1\nb: 2\na: 3\n", 3, "a duplicate key"),
        (b"x: {a: 1, a: 2}\n", 1, "a duplicate key"),
        (b"a: 1\n1: 2\n", 2, "the key '1'"),
        (b"a: 1\n[b]: 2\n", 2, "a list or mapping"),
        (b"a: *nowhere\n", 1, "undefined alias"),
        (b"a: &a [*a]\n", None, "aliases that multiply"),
        (b"a: &a {b: *a}\n", None, "aliases that multiply"),
        (b"[" * 5000, 1, "nested more than 50 deep"),
        (b"a: {" * 60, 1, "nested more than 50 deep"),
        (b"#" * (MAX_BYTES + 1), None, "more than 1 MiB"),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else None,
)
def test_a_file_that_is_no_job_at_all(tmp_path: Path, content: bytes, line: int | None, value: str):
    file = tmp_path / "job.yaml"
    file.write_bytes(content)
    with pytest.raises(JobFileError) as caught:
        load_job(file)
    (found,) = caught.value.problems
    assert found.line == line
    assert value in found.value
    assert not (tmp_path / "pwned").exists()


def test_an_alias_bomb_is_cheap_and_refused(tmp_path: Path):
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 5)}]" for n in range(1, 10)]
    (found,) = problems(tmp_path, "\n".join(levels))
    assert "aliases that multiply" in found[2]
    merges = ["m0: &m0 {x: 1}"]
    merges += [f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}" for n in range(1, 25)]
    (found,) = problems(tmp_path, "\n".join(merges))
    assert "aliases that multiply" in found[2]


def test_more_aliases_than_allowed_are_refused_and_few_are_fine(tmp_path: Path):
    many = "a: &a 1\nb: [" + ", ".join(["*a"] * (MAX_ALIASES + 1)) + "]\n"
    (found,) = problems(tmp_path, many)
    assert found[0] == 2
    assert f"more than {MAX_ALIASES} aliases" in found[2]
    base = "bit_plans:\n  - &p {name: p, method: rtn, bits: 4}\n  - {<<: *p, name: q}\n"
    assert [plan.name for plan in load(tmp_path, HEAD + MODELS + base).job.bit_plans] == ["p", "q"]


def test_a_path_that_is_no_file(tmp_path: Path):
    for path, value in ((tmp_path, "a folder"), (tmp_path / "none.yaml", "nothing there")):
        with pytest.raises(JobFileError, match=value):
            load_job(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1, 2\nb: 3\n", "line 2: (file): got expected ',' or ']', but got ':' at column 2; expected valid YAML:"),
        ("a: 'x\n", "line 2: (file): got found unexpected end of stream at column 1; expected valid YAML:"),
        (
            "a: !foo 1\n",
            "line 1: (file): got could not determine a constructor for the tag '!foo' at column 4; expected YAML",
        ),
        ("a: \0\n", "(file): got unacceptable character #x0000: special characters are not allowed"),
        (
            "a: " + "[" * 60,
            "line 1: (file): got fields nested more than 50 deep at column 53; expected a job file within",
        ),
    ],
)
def test_broken_yaml_is_told_once_with_line_and_column(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(JobFileError) as caught:
        load_job(file)
    assert str(caught.value).startswith(f"{file}: {said}")
    assert len(str(caught.value).splitlines()) == 1
    assert ("without tags" in str(caught.value)) == ("!foo" in text)
