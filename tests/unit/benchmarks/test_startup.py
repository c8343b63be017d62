from benchmarks.startup import FLOOR, PROGRAMS, measure


def test_every_program_runs_and_is_compared_with_its_floor():
    found = measure(rounds=1)
    assert list(found["ratio"]) == list(found["cpu_s"]) == list(PROGRAMS)
    assert found["ratio"][FLOOR] == 1
    assert all(seconds > 0 for seconds in found["cpu_s"].values())
