"""The races of ``python -m bench`` as pytest-benchmark tests.

    python -m pytest bench --benchmark-json=out.json    measure
    python -m pytest bench --benchmark-disable          smoke test: small sizes, gates still checked

pytest-benchmark times ours; the row with the interleaved rounds goes to its ``extra_info``, and all
rows are printed as a table at the end.
"""

import pytest

from bench.race import Unavailable, all_races, run

ROWS = pytest.StashKey[list]()


def pytest_generate_tests(metafunc):
    quick = metafunc.config.getoption("--benchmark-disable")
    races = list(all_races(quick))
    metafunc.parametrize("race", races, ids=lambda race: race.name)


def test_race(race, benchmark, device, request):
    if not race.runs_on(device.type):
        pytest.skip("this race is of another device")
    quick = request.config.getoption("--benchmark-disable")
    row = run(race, device=device, quick=quick)
    if "skipped_row" in row:
        pytest.skip(row["skipped_row"])
    assert row["gate"]["passed"], row["gate"]
    benchmark.extra_info.update(row)
    request.config.stash.setdefault(ROWS, []).append({"name": race.name, **row})
    try:
        lineup = race.setup(device)
    except Unavailable as reason:
        pytest.skip(str(reason))
    (ours,) = (c.call for c in lineup.contenders if c.role == "ours")
    benchmark.pedantic(ours, rounds=1 if quick else 20, warmup_rounds=0 if quick else 3)
