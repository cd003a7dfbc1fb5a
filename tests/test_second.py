"""The second study: equal care for all conditions, pairs of one computer, checkpoints that can be made again."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from unipre3d.records import read_record, write_json
from unipre3d.reproduce.plan import SEEN_KINDS, Row, plan
from unipre3d.reproduce.run import (
    chosen_rate,
    missing,
    plain,
    planned,
    recipe_of,
    run_path,
    run_row,
)
from unipre3d.reproduce.second import (
    ARMS,
    EXPLORATORY,
    FIRST_SEED,
    OUTLINE,
    PAIRS,
    PRIMARY,
    RATES,
    SHORT,
    SHORT_BLOCKS,
    SHORT_LEAST,
    SHORT_PAIRS,
    SHORT_SEED,
    STEPS,
    TRIAL_SEED,
    coverage,
    judge,
    made_again,
    pair_differences,
    paired_interval,
    pairs_needed,
    plan_second,
    plan_short,
    pooled_spread,
    residuals,
    second_effects,
    short_answer,
    short_effects,
    short_left,
    short_seeds,
)
from unipre3d.reproduce.statistics import interval, read_study
from unipre3d.runs.recipe import to_values

ROWS = plan_second()
SHORT_ROWS = plan_short()
BY_KEY = {row.key: row for row in (*SHORT_ROWS, *ROWS)}


def values_of(key):
    "The values of a row without its trials."
    return to_values(recipe_of(replace(BY_KEY[key], tune=()), ""))


def test_primary_set_is_small_and_has_all_its_pairs():
    assert len(PRIMARY) == len(set(PRIMARY)) <= 8
    for c in PRIMARY:
        seeds = [
            {r.seed for r in ROWS if (r.part, r.arm) == (c.part, arm) and r.seed != TRIAL_SEED}
            for arm in (c.arm, c.against)
        ]
        assert seeds[0] == seeds[1] == set(range(FIRST_SEED, FIRST_SEED + PAIRS)), c.what


def test_every_condition_gets_the_same_tries():
    for arm in ARMS:
        tried = [r for r in ROWS if r.key.startswith(f"tune-short-{arm}-")]
        assert [r.changes["lr"] for r in tried] == list(RATES), arm
        assert {r.seed for r in tried} == {TRIAL_SEED}
        assert {r.changes["steps"] for r in tried} == {ARMS[arm].changes["steps"] // 4}
        probes = [r for r in ROWS if r.key.startswith(f"tune-ridge20-{arm}-")]
        assert [p.start for p in probes] == [r.key for r in tried]
        assert all(p.changes["validation"] == "split" for p in probes)
        for seed in range(FIRST_SEED, FIRST_SEED + PAIRS):
            assert BY_KEY[f"pre-{arm}-{seed}"].tune == tuple(p.key for p in probes)


def test_conditions_differ_in_what_they_say_and_nothing_else():
    ours = values_of("pre-colour-10")
    for arm, keys in {
        "outline": {"terms", "fusion"},
        "outline.long": {"terms", "fusion", "steps"},
        "both": {"terms"},
        "plain": {"fusion"},
        "geometry": {"terms"},
        "geometry.depth": {"terms"},
        "geometry.normal": {"terms"},
        "geometry.alone": {"terms", "fusion"},
    }.items():
        other = values_of(f"pre-{arm}-10")
        assert {k for k in ours if ours[k] != other[k]} == keys, arm
    assert "colour" not in OUTLINE["terms"] and OUTLINE["fusion"] == "NoFusion"
    for arm in ("volume", "masked", "contrast"):
        other = values_of(f"pre-{arm}-10")
        for key in ("data", "classes", "per_class", "batch_size", "n_points", "backbone_options"):
            assert other[key] == ours[key], (arm, key)
    assert values_of("pre-masked-10")["steps"] == values_of("pre-contrast-10")["steps"] == STEPS
    assert set(ours["classes"]) == set(SEEN_KINDS)


def test_no_row_is_one_of_the_first_study_and_each_can_run_here():
    assert len(BY_KEY) == len(ROWS) + len(SHORT_ROWS)
    assert not set(BY_KEY) & {r.key for r in plan("mini")}
    first = {r.seed for r in plan("mini") if not r.key.startswith("tune-")}
    assert FIRST_SEED > max(first)
    assert not any(missing(replace(r, tune=())) for r in BY_KEY.values())


def test_a_question_takes_what_it_needs_and_a_seed_is_whole():
    chosen = planned("second", "s")
    assert {r.claim for r in chosen} == {"s"}
    order = [r.key for r in chosen]
    for seed in range(FIRST_SEED, FIRST_SEED + PAIRS - 1):
        arms = ("random", "colour", "outline", "outline.long", "both", "plain")
        last = max(order.index(f"ridge20-{arm}-{seed}") for arm in arms)
        assert last < order.index(f"ridge20-random-{seed + 1}")
    with pytest.raises(ValueError, match="--only: expected a claim"):
        planned("second", "nothing")


def test_rate_of_a_pre_training_is_that_of_the_trial_whose_features_validate_best(tmp_path):
    (tmp_path / "records").mkdir()
    base = read_record("object-transformer-mini")
    for rate, score in zip(RATES, (0.2, 0.4, 0.3)):
        probe, start = f"tune-ridge20-outline-{rate:g}", f"tune-short-outline-{rate:g}"
        for key, metrics in ((probe, {"val_oa_ridge": score}), (start, {})):
            record = base | {
                "row": plain(BY_KEY[key]),
                "values": {"lr": rate if key == start else 1e-3},
                "metrics": base["metrics"] | metrics,
                "chosen": {"score": 0.0},
            }
            write_json(tmp_path / "records" / f"{key}.json", record)
    assert chosen_rate(BY_KEY["pre-outline-10"], tmp_path) == RATES[1]


def test_interval_covers_what_the_first_study_scattered_by():
    differences = pair_differences()
    _, bound = pooled_spread(differences, 6)
    assert pairs_needed(bound) == PAIRS
    assert abs(coverage(None, PAIRS, draws=40_000) - 0.95) < 0.004
    assert coverage(residuals(differences), PAIRS) > 0.93


def test_interval_is_that_of_paired_numbers():
    from scipy import stats

    gen = np.random.default_rng(0)
    a, b = gen.normal(size=(2, 12))
    i = paired_interval(a - b)
    low, high = stats.t.interval(0.95, 11, (a - b).mean(), stats.sem(a - b))
    assert np.allclose([i.low, i.high], [low, high])
    wide = interval((a - b)[:, None])  # by a bootstrap with as many objects: one
    assert abs(wide.low - i.low) < 0.1


def test_a_verdict_waits_for_all_pairs():
    few = np.full(PAIRS - 1, 5.0) + np.linspace(-0.1, 0.1, PAIRS - 1)
    assert judge(few) == f"{PAIRS - 1} of {PAIRS} pairs: no verdict"
    assert judge(np.append(few, 5.0)) == "first ahead"
    assert judge(-np.append(few, 5.0)) == "second ahead"


def toy_records(computer, pairs=3):
    "Records of two conditions with the given computer of the second one."
    base = read_record("cls-shapes-mini")
    found = {}
    for arm, more, cpu in (("outline", 0.02, computer), ("colour", 0.0, "one")):
        for seed in range(FIRST_SEED, FIRST_SEED + pairs):
            record = copy.deepcopy(base)
            record["row"] = plain(BY_KEY[f"ridge20-{arm}-{seed}"])
            record["metrics"]["oa_ridge"] = 0.4 + more + 0.001 * seed
            record["hardware"]["cpu"] = cpu
            found[f"ridge20-{arm}-{seed}"] = record
    return found


def test_nothing_but_the_mean_is_shown_before_all_pairs():
    interval = ["low", "high", "low8", "high8"]
    table = second_effects(toy_records("one", PAIRS - 1)).iloc[0]
    assert table[interval].isna().all() and table["mean"] == 2.0
    table = second_effects(toy_records("one", PAIRS)).iloc[0]
    assert table[interval].notna().all() and table["verdict"] == "first ahead"


def test_pairs_of_two_computers_are_left_out_and_counted():
    table = second_effects(toy_records("one")).iloc[0]
    assert (table["pairs"], table["left out"], table["mean"]) == (3, 0, 2.0)
    assert table["verdict"] == f"3 of {PAIRS} pairs: no verdict"
    table = second_effects(toy_records("another")).iloc[0]
    assert (table["pairs"], table["left out"]) == (0, 3)
    assert len(second_effects({})) == len(PRIMARY) + len(EXPLORATORY)


def failed_record(key):
    "What is left of a run whose losses were not finite."
    return {key: {"row": plain(BY_KEY[key])}}


def test_a_failed_run_takes_its_pair_and_two_make_a_comparison_void():
    records = toy_records("one", PAIRS)
    for arm in ("outline", "colour"):
        del records[f"ridge20-{arm}-{FIRST_SEED}"]
    lost = failed_record(f"pre-outline-{FIRST_SEED}")
    table = second_effects(records, failed=lost).iloc[0]
    assert (table["pairs"], table["failed"], table["verdict"]) == (PAIRS - 1, 1, "first ahead")
    lost |= failed_record(f"ridge20-colour-{FIRST_SEED + 1}")
    lost |= failed_record(f"ridge20-colour-{FIRST_SEED}")  # of a pair that is lost already
    table = second_effects(records, failed=lost).iloc[0]
    assert table["verdict"] == "void: 2 pairs failed"
    assert table[["low", "high"]].isna().all()
    other = failed_record("pre-masked-10") | failed_record("pre-masked-11")
    assert second_effects(records, failed=other).iloc[0]["failed"] == 0


def test_a_repeated_checkpoint_is_compared_with_the_first():
    for rows, count in ((ROWS, len(ARMS)), (SHORT_ROWS, 5)):
        again = [r for r in rows if r.part.startswith("again")]
        assert len({r.arm for r in again}) == len(again) == count
        for row in again:
            first = BY_KEY[row.key.removeprefix("again-")]
            assert replace(first, key=row.key, part=row.part) == row
    first = {"row": plain(BY_KEY["short-pre-colour-30"]), "checkpoint_sha256": "a"}
    second = {"row": plain(BY_KEY["again-short-pre-colour-30"]), "checkpoint_sha256": "a"}
    table = made_again({"first": first, "second": second})
    assert table.to_dict("records") == [{"condition": "colour", "seed": 30, "equal": True}]
    table = made_again({"first": first, "second": second | {"checkpoint_sha256": "b"}})
    assert not table["equal"].any()


def test_the_short_part_has_the_same_conditions_and_whole_seeds():
    ours = values_of("short-pre-colour-30")
    for arm, keys in {
        "outline": {"terms", "fusion"},
        "outline.long": {"terms", "fusion", "steps"},
        "geometry": {"terms"},
    }.items():
        other = values_of(f"short-pre-{arm}-30")
        assert {k for k in ours if ours[k] != other[k]} - {"lr"} == keys, arm
    other = values_of("short-pre-masked-30")
    for key in ("classes", "per_class", "batch_size", "steps", "n_points", "backbone_options"):
        assert other[key] == ours[key], key
    for c in SHORT:
        for arm in (c.arm, c.against):
            seeds = [r.seed for r in SHORT_ROWS if (r.part, r.arm) == (c.part, arm)]
            assert seeds == list(range(SHORT_SEED, SHORT_SEED + SHORT_PAIRS))
    for arms in SHORT_BLOCKS:
        own = [r for r in SHORT_ROWS if r.arm in arms and r.part in ("pre.short", "ridge80.short")]
        assert [r.seed for r in own] == sorted(r.seed for r in own)
    assert {r.claim for r in planned("second", "short")} == {"short"}


def short_records(pairs):
    "Records of outline and colour in the short part, colour ahead by two points."
    base = read_record("cls-shapes-mini")
    records = {}
    for arm, more in (("colour", 0.02), ("outline", 0.0)):
        for seed in range(SHORT_SEED, SHORT_SEED + pairs):
            record = copy.deepcopy(base)
            record["row"] = plain(BY_KEY[f"short-ridge80-{arm}-{seed}"])
            record["metrics"]["oa_ridge"] = 0.4 + more + 0.001 * seed * (arm == "colour")
            records[f"short-ridge80-{arm}-{seed}"] = record
    return records


def test_the_short_part_shows_an_interval_for_the_pairs_that_are_there():
    table = short_effects(short_records(SHORT_LEAST), {}).iloc[0]
    assert (table["pairs"], table["verdict"]) == (SHORT_LEAST, "first ahead")
    assert table[["low", "high", "low4", "high4"]].notna().all()
    table = short_effects(short_records(SHORT_LEAST - 1), {}).iloc[0]
    assert table["verdict"] == f"{SHORT_LEAST - 1} of {SHORT_LEAST} pairs: no verdict"
    assert table[["low", "high", "low4", "high4"]].isna().all()


def test_the_short_part_says_what_is_there_and_what_is_not():
    records = short_records(SHORT_LEAST)
    lines = short_answer(short_effects(records, {})).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("colour - outline, equal steps, all labels: first ahead, +")
    assert lines[0].endswith(f"{SHORT_LEAST} of {SHORT_PAIRS} pairs")
    assert lines[1].endswith(f"0 of {SHORT_LEAST} pairs: no verdict")
    table = short_seeds(records)
    assert table.loc["outline", SHORT_SEED] == 40.0
    assert table.loc["colour"].notna().sum() == SHORT_LEAST and table.loc["random"].isna().all()
    rest = len(SHORT_ROWS) - len(records)
    assert short_left(records).startswith(f"{rest} of {len(SHORT_ROWS)} rows are not run: unipre3d")
    assert short_left(BY_KEY) == ""


NET = dict(width=32, depth=1, num_heads=2, num_groups=16, group_size=8, radius=None)
NET |= dict(encoder_widths=(16, 32, 32), encoder_dims=32)
QUICK = dict(backbone_options=NET, n_points=64, batch_size=4, warmup=0, workers=0)


def toy(key, recipe, kind="pretrain", start="none", seed=0, **changes):
    return Row(key, "s", "primary", "pre", "toy", kind, recipe, QUICK | changes, seed, 0.1, start)


def test_a_checkpoint_is_made_again_and_its_features_score_in_closed_form(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    how = dict(steps=3, resolution=16, n_target=1, save_every=0, validate_every=0, picture_every=0)
    rows = [toy(f"pre-toy-{n}", "object-outline-mini", **how) for n in range(2)]
    records = [run_row(row, tmp_path, say=lambda text: None) for row in rows]
    assert records[0]["checkpoint_sha256"] == records[1]["checkpoint_sha256"]  # one seed, two runs
    other = run_row(toy("pre-toy-2", "object-outline-mini", seed=1, **how), tmp_path, print)
    assert other["checkpoint_sha256"] != records[0]["checkpoint_sha256"]
    fine = dict(classes=("bed", "lamp"), shots=4, steps=1, probe=True, ridge=2, hidden=16)
    row = toy("ridge-toy-0", "cls-furniture-mini", "finetune", "pre-toy-0", **fine)
    record = run_row(row, tmp_path, say=lambda text: None)
    assert record["start"]["sha256"] == records[0]["checkpoint_sha256"]
    metrics, details = record["metrics"], record["details"]
    assert 0 <= metrics["oa_ridge"] <= 1 and 0 <= metrics["val_oa_ridge"] <= 1
    equal = map(str.__eq__, details["answers_ridge"], details["true"])
    assert sum(equal) / len(details["true"]) == pytest.approx(metrics["oa_ridge"])
    assert (run_path(row.key, tmp_path) / "checkpoint.safetensors").is_file()
    torch.set_num_threads(threads)


def test_a_run_that_fails_is_recorded_and_is_no_result(tmp_path):
    how = dict(steps=40, resolution=16, n_target=1, save_every=0, validate_every=0, picture_every=0)
    row = toy("pre-toy-9", "object-outline-mini", lr=1e30, clip=1e38, **how)
    with pytest.raises(ValueError, match="expected a run with finite losses"):
        run_row(row, tmp_path, say=lambda text: None)
    assert not (tmp_path / "records").exists()
    failed = read_study(tmp_path / "failed" / "records")
    assert failed["pre-toy-9"]["ended"] == "diverged"
    assert failed["pre-toy-9"]["row"]["key"] == "pre-toy-9"
