import json
import platform

from benchmarks.environment import cpu_model, git_commit, write_result


def test_the_processor_is_the_one_that_the_system_names(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: A Processor @ 2.0 GHz: fast\n")

    assert cpu_model(cpuinfo) == "A Processor @ 2.0 GHz: fast"


def test_without_a_name_the_processor_is_its_architecture(tmp_path):
    assert cpu_model(tmp_path / "cpuinfo") == platform.machine()


def test_outside_of_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    assert git_commit(tmp_path) is None


def test_a_result_is_written_into_a_new_folder(tmp_path):
    path = tmp_path / "results" / "perf.json"

    write_result(path, {"ratio": 2.5})

    assert json.loads(path.read_text()) == {"ratio": 2.5}


def test_a_list_of_values_takes_one_line_and_reads_as_it_was(tmp_path):
    path = tmp_path / "perf.json"
    result = {"attempts": [[1, "a [ b ]\n c", None], []], "rounds": [{"steps": [1.5, 2.5]}]}

    write_result(path, result)

    text = path.read_text()
    assert json.loads(text) == result
    assert "[1.5, 2.5]" in text
