"""The search for a step size: by hand on scores that are known, and as a command that can be killed."""

import json
from pathlib import Path

import pytest

from isopo_mini.experiments import pool, records, search
from isopo_mini.experiments.command import main, parse_rules


def runs_of(scores: dict[str, dict[float, list[float]]]) -> list[dict]:
    """Records whose rule, optimizer, step size, seed and score are what matters."""
    made = []
    for text, by_size in scores.items():
        rule, _, optimizer = text.partition("/")
        for size, row in by_size.items():
            for seed, score in enumerate(row):
                run = {"task": "bandit", "rule": rule, "optimizer": optimizer or "adamw", "learning_rate": size}
                made.append(
                    {
                        "run": run | {"seed": seed, "phase": "choose"},
                        "curve": {"step": [0, 1], "return": [0.0, score]},
                        "status": "finished",
                        "score": score,
                        "final": score,
                        "area": score,
                        "target": 1.0,
                        "to_target": None,
                        "wall_seconds": 1.0,
                    }
                )
    return made


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({0.1: 0.2, 0.4: 0.9, 1.6: 0.3}, [0.2, 0.8]),
        ({0.1: 0.2, 0.2: 0.3, 0.4: 0.9, 1.6: 0.3}, [0.8]),
        ({0.1: 0.2, 0.4: 0.5, 1.6: 0.8}, [0.8, 3.2]),  # at the edge: on, until it is none
        ({0.1: 0.9, 0.4: 0.5}, [0.05, 0.2]),
        ({0.2: 0.2, 0.4: 0.9, 0.8: 0.3}, []),
        ({0.199: 0.2, 0.4: 0.9, 0.801: 0.3}, []),  # the same, as far as a step size goes
    ],
)
def test_the_double_and_the_half_of_the_best_are_wanted(scores: dict[float, float], expected: list[float]) -> None:
    table = records.as_table(runs_of({"ntk": {size: [score, score] for size, score in scores.items()}}))
    more = search.refined(table, {"ntk": list(scores)}, "adamw")
    assert more == ({"ntk": expected} if expected else {})


def test_every_optimizer_has_its_own_search_and_a_family_its_best() -> None:
    scores = {
        "ntk:damping=1/sgd": {1.0: [0.1, 0.1], 2.0: [0.6, 0.6], 4.0: [0.2, 0.2]},
        "ntk:damping=1/adamw": {1.0: [0.1, 0.1], 2.0: [0.5, 0.9], 4.0: [0.2, 0.2]},
        "ntk:damping=9/sgd": {1.0: [0.3, 0.1], 2.0: [0.4, 0.9]},
        "grpo": {1.0: [0.3, 0.3]},
    }
    table = records.as_table(runs_of(scores))
    sizes = {text: list(row) for text, row in scores.items()}
    assert search.refined(table, sizes, "adamw") == {"ntk:damping=9/sgd": [4.0], "grpo": [0.5, 2.0]}
    families = {"ntk:damping=1|9": list(scores)[:3], "grpo": ["grpo"]}
    assert search.chosen(table, families, "adamw", ["best"]) == {"ntk:damping=1/adamw": [2.0], "grpo": [1.0]}
    assert search.chosen(table, families, "adamw", ["grpo", "ntk:damping=9/sgd"]) == {
        "ntk:damping=9/sgd": [2.0],
        "grpo": [1.0],
    }
    assert set(search.chosen(table, families, "adamw", ["all"])) == set(scores)


def test_rules_with_alternatives_and_optimizers() -> None:
    sizes, families = parse_rules(["ntk:damping=1|10,scale=natural/sgd|momentum@3", "grpo"], [0.1], ["adamw", "muon"])
    assert sizes == {
        "ntk:damping=1,scale=natural/sgd": [3.0],
        "ntk:damping=1,scale=natural/momentum": [3.0],
        "ntk:damping=10,scale=natural/sgd": [3.0],
        "ntk:damping=10,scale=natural/momentum": [3.0],
        "grpo/adamw": [0.1],
        "grpo/muon": [0.1],
    }
    assert families == {"ntk:damping=1|10,scale=natural": list(sizes)[:4], "grpo": ["grpo/adamw", "grpo/muon"]}
    with pytest.raises(ValueError, match="optimizer: expected one of sgd, momentum, adamw, muon, got 'adam'"):
        parse_rules(["ntk/adam@1"], [])


def test_as_a_command_it_ends_inside_and_finds_its_way_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The score is best at a step size of 3, whatever a run does."""
    ran = []

    def known(one: pool.Run, actual=pool.run) -> dict:  # type: ignore[no-untyped-def]
        ran.append(one.file_name)
        if len(ran) == stop:
            raise KeyboardInterrupt
        off = abs(one.learning_rate - 3) + (one.optimizer == "sgd")
        return actual(one) | {"score": 10 - off}

    monkeypatch.setattr(pool, "run", known)
    line = "bandit --rules reinforce ntk:damping=1|2 --optimizer sgd adamw --learning-rates 0.25 1 --search"
    numbers = "--report best --seeds 0 1 --report-seeds 10 11 --steps 1 --processes 1"
    command = [*line.split(), *numbers.split(), "--out", str(tmp_path / "out")]
    stop = 30
    with pytest.raises(KeyboardInterrupt):
        main(command)
    stop = -1
    main(command)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert len(config["step_sizes"]) == 6
    assert set(map(tuple, config["step_sizes"].values())) == {(0.25, 0.5, 1.0, 2.0, 4.0)}
    assert len(set(ran)) == len(ran) - 1, "only the run that was interrupted was made again"
    found = records.load_records(tmp_path / "out")
    reported = found[found["phase"] == "report"]
    assert set(zip(reported["rule"], reported["optimizer"], reported["learning_rate"], strict=True)) == {
        ("reinforce", "adamw", 2.0),
        ("ntk:damping=1", "adamw", 2.0),
    }
    before = len(ran)
    main(command)
    assert len(ran) == before


def test_a_screening_with_one_seed_leaves_the_best_of_each_family_to_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first seed likes SGD best, AdamW next and momentum least; with all of them AdamW is better."""
    ran = []

    def known(one: pool.Run, actual=pool.run) -> dict:  # type: ignore[no-untyped-def]
        ran.append(one)
        bonus = {"sgd": 5.0 if one.seed == 0 else 0.0, "adamw": 4.0, "momentum": 3.0}[one.optimizer]
        return actual(one) | {"score": bonus - abs(one.learning_rate - 2)}

    monkeypatch.setattr(pool, "run", known)
    line = "bandit --rules reinforce --optimizer sgd momentum adamw --learning-rates 0.5 2 --search --screen 1"
    numbers = "--report best --seeds 0 1 2 --report-seeds 10 11 --steps 1 --processes 1"
    command = [*line.split(), *numbers.split(), "--out", str(tmp_path / "out")]
    main(command)
    screened = {(one.optimizer, one.learning_rate) for one in ran if one.seed == 0}
    assert screened == {(name, size) for name in ("sgd", "momentum", "adamw") for size in (0.5, 1.0, 2.0, 4.0)}
    finalists = {(one.optimizer, one.learning_rate) for one in ran if one.seed in (1, 2)}
    assert finalists == {(name, size) for name in ("sgd", "adamw") for size in (1.0, 2.0, 4.0)}
    assert {(one.optimizer, one.learning_rate) for one in ran if one.seed in (10, 11)} == {("adamw", 2.0)}
    table = records.summary(records.load_records(tmp_path / "out")).set_index("optimizer")
    assert list(table.index) == ["adamw", "sgd"], "without a row for what a screening left behind"
    assert list(table["choose_seeds"]) == [3, 3]
    assert list(table["choose_score"]) == pytest.approx([4.0, 5.0 / 3])
    assert list(table["at_edge"]) == ["", ""]
    before = len(ran)
    main(command)
    assert len(ran) == before, "given again, nothing is run again"
