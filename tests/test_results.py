"Intervals cover, tables are what the records say, and a changed record is noticed."

import copy

import numpy as np
import pytest
from scipy import stats

from unipre3d.records import FINETUNE, PRETRAIN, read_record, write_json
from unipre3d.reproduce.claims import REASONS, SECTIONS, findings, headline, in_order
from unipre3d.reproduce.curves import late_rise
from unipre3d.reproduce.paper import (
    FULL_METRIC,
    GAINS,
    MINI,
    TABLES,
    compare_table,
    full_key,
    paper_gain,
    paper_table,
)
from unipre3d.reproduce.plan import CLAIMS, COMPARISONS, MASKED_RATES, plan
from unipre3d.reproduce.statistics import (
    class_accuracy,
    crossed_interval,
    effects,
    interval,
    paired,
    read_study,
    right,
    scores,
)
from unipre3d.reproduce.tables import (
    all_frame,
    chosen_rates,
    every_seed,
    label_counts,
    repeated,
    stale_tables,
    tables,
    write_tables,
)

CLASSES = ["bag", "bin", "box"]
PLANNED = {r.key: r for r in plan()}


def record(key, seed=0, p=0.7, objects=90, **metrics):
    "A record that nobody ran."
    row, rng = PLANNED[key], np.random.default_rng((seed, sum(map(ord, key))))
    true = "abc" * (objects // 3)
    answers = "".join(t if rng.random() < p else "abc"[(ord(t) - 96) % 3] for t in true)
    matrix = [[sum(a == x and t == y for a, t in zip(answers, true)) for x in "abc"] for y in "abc"]
    kind = "pretrain" if row.kind == "pretrain" else "finetune"
    found = {"kind": kind} | dict.fromkeys(PRETRAIN if kind == "pretrain" else FINETUNE, None)
    return found | {
        "recipe": row.recipe,
        "classes": CLASSES,
        "details": dict(
            answers=answers, true=true, answers_real=answers, true_real=true, confusion=matrix
        ),
        "metrics": {"oa": 0.5} | metrics,
        "data": {"name": "shapes", "sha256": "0"},
        "seed": row.seed,
        "history": {"train": {}, "val": {"step": [1], "val_oa": [0.5]}},
        "row": dict(key=key, part=row.part, arm=row.arm, seed=row.seed),
    }


def some(gain=0.3, seeds=5):
    return {
        k: record(k, s, 0.6 + (gain if arm == "unipre3d" else 0))
        for s in range(seeds)
        for arm in ("unipre3d", "scratch")
        for k in [f"cls20-{arm}-{s}"]
    }


@pytest.mark.parametrize("n", [3, 5, 10])
def test_interval_is_the_t_interval_for_plain_numbers(n):
    x = np.random.default_rng(n).normal(2, 3, n)
    low, high = stats.t.interval(0.95, n - 1, x.mean(), stats.sem(x))
    i = interval(x, draws=40_000)
    assert i.mean == pytest.approx(x.mean()) and i.n == n
    assert (i.high - i.low) == pytest.approx(high - low, rel=0.03)


@pytest.mark.parametrize(
    "runs, objects, noise", [(1.0, 0.0, 0.0), (0.2, 1.0, 1.0), (0.0, 0.0, 1.0), (0.5, 0.5, 0.5)]
)
def test_interval_covers(runs, objects, noise):
    rng, hits = np.random.default_rng(0), 0
    for _ in range(250):
        i = interval(
            rng.normal(0, runs, (5, 1))
            + rng.normal(0, objects, (1, 40))
            + rng.normal(0, noise, (5, 40)),
            draws=200,
        )
        hits += i.low < 0 < i.high
    assert hits / 250 > 0.92


@pytest.mark.parametrize(
    "runs, objects, noise", [(1.0, 0.0, 0.0), (0.2, 1.0, 1.0), (0.0, 0.0, 1.0), (0.5, 0.5, 0.5)]
)
def test_crossed_interval_covers_about_what_it_says(runs, objects, noise):
    rng, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        i = crossed_interval(
            rng.normal(0, runs, (5, 1))
            + rng.normal(0, objects, (1, 40))
            + rng.normal(0, noise, (5, 40))
        )
        hits += i.low < 0 < i.high
    assert 0.92 < hits / 1000 < 0.985


def test_crossed_interval_of_plain_numbers_is_the_t_interval():
    x = np.random.default_rng(0).normal(2, 3, 5)
    i = crossed_interval(x)
    assert (i.low, i.high) == pytest.approx(stats.t.interval(0.95, 4, x.mean(), stats.sem(x)))
    assert np.isnan(crossed_interval(x[:1]).low) and crossed_interval(np.zeros((3, 4))).high == 0


def test_interval_of_one_run_is_open():
    i = interval(np.array([3.0]))
    assert i.n == 1 and np.isnan(i.low) and str(i) == "3.0"


def test_strict_interval_holds_the_usual_one():
    x = np.random.default_rng(0).normal(0, 1, (5, 50))
    assert (
        interval(x, 1 - 0.05 / 6).low
        < interval(x).low
        < interval(x).high
        < interval(x, 1 - 0.05 / 6).high
    )


def test_seen_and_unseen_make_up_all():
    r = record("cls20-scratch-0")
    assert (
        len(right(r, "seen")) + len(right(r, "unseen")) == len(right(r))
        and len(right(r, "unseen")) == 30
    )  # only box is held out of the three
    table = class_accuracy(r)
    assert right(r, "unseen").mean() == pytest.approx(table.accuracy["box"]) and right(
        r
    ).mean() == pytest.approx(np.average(table.accuracy, weights=table.objects))


def test_pairs_are_seeds_that_both_have():
    records = some()
    del records["cls20-scratch-3"]
    d, seeds = paired(records, COMPARISONS[0])
    assert seeds == [0, 1, 2, 4] and d.shape == (4, 90)


def test_trials_are_no_results():
    records = some(seeds=1)
    records["tune-cls20-unipre3d-0.001"] = record("tune-cls20-unipre3d-0.001")
    assert list(scores(records, "cls20", "unipre3d")) == [0]


def test_effects_say_what_the_records_say():
    table = effects(some())
    first = table.iloc[0]
    assert (
        first.verdict == "yes"
        and first.pairs == 5
        and first.effect
        == pytest.approx(
            100
            * np.mean(
                [
                    right(some()[f"cls20-unipre3d-{s}"]).mean()
                    - right(some()[f"cls20-scratch-{s}"]).mean()
                    for s in range(5)
                ]
            ),
            abs=0.01,
        )
    )
    assert effects(some(gain=-0.4)).iloc[0].verdict == "the opposite" and set(
        effects({}).verdict
    ) == {"not run"}
    assert (
        table[table.verdict == "not run"]
        .how.str.match("unipre3d reproduce (mini|full) --only")
        .all()
    )


def test_every_command_of_a_missing_row_selects_something():
    from unipre3d.reproduce.plan import select

    table = effects(read_study())
    for c, how in zip(COMPARISONS, effects({}).how):
        found = set()
        for one in how.split("; "):
            _, _, budget, _, only = one.split(" (")[0].split()
            found |= {(r.part, r.arm) for r in select(plan(budget), only)}
        assert {(c.part, c.arm), (c.part, c.against)} <= found  # both sides
    assert all(("unipre3d reproduce" in r.how) == (r.pairs < r.planned) for r in table.itertuples())


def test_pairs_of_two_computers_are_counted_and_missing_ones_named():
    records = some()
    for s in (1, 3):
        records[f"cls20-scratch-{s}"]["data"] = {"name": "shapes", "sha256": "1"}
    del records["cls20-unipre3d-4"]
    first = effects(records).iloc[0]
    assert (first.pairs, first.planned, first.mixed) == (4, 5, 2)
    assert first.how.startswith(
        "cls20-{unipre3d,scratch}-{0,1,2,3}; 1 pairs not run: unipre3d reproduce mini --only cls20-unipre3d"
    )


def test_every_seed_is_in_the_table():
    records = some()
    table = every_seed(records).set_index("condition").query("metric == 'oa'")
    for arm in ("unipre3d", "scratch"):
        for s in range(5):
            assert table.loc[arm, f"seed {s}"] == pytest.approx(
                100 * right(records[f"cls20-{arm}-{s}"]).mean(), abs=0.01
            )
    assert len(every_seed({})) == 0 and {
        c.part for c in COMPARISONS if not c.part.endswith(".large")
    } >= set(every_seed(read_study()).measurement)


def test_paper_table_and_mappings():
    paper = paper_table()
    assert (
        set(paper.table) == set(TABLES)
        and not paper.duplicated(
            ["table", "dataset", "metric", "backbone", "pretraining", "source"]
        ).any()
    )
    assert set(MINI) <= {
        (r.dataset, r.metric, r.backbone, r.pretraining) for r in paper.itertuples()
    }
    parts = {(r.part, r.arm) for r in plan()}
    assert {(part, arm) for part, arm, _ in MINI.values()} <= parts
    assert {(part, a) for part, a, _ in GAINS} | {(part, b) for part, _, b in GAINS} <= parts
    assert {full_key(r) for r in paper.itertuples()} - {""} == {
        r.key for r in plan("full") if r.kind == "finetune" and r.needs
    }
    assert [round(paper_gain(c), 2) for c in COMPARISONS[:2]] == [10.69, 2.1] and set(REASONS) == {
        c.claim for c in COMPARISONS
    }


def test_every_number_of_the_paper_is_in_a_table():
    assert sum(len(compare_table(name, {})) for name in TABLES) == len(paper_table())


def test_findings_and_headline_follow_the_records():
    assert (
        "yes" in findings(some())[0]
        and "Guessed before the runs" in findings(some(gain=-0.4))[0]
        and headline({}).count("not run yet") == 6
    )
    assert headline(some()) != headline({})


def test_claims_stand_in_the_order_of_the_paper():
    order = "".join(SECTIONS.values())
    assert sorted(order) == sorted(CLAIMS)
    table = in_order(effects({}))
    assert sorted(table.index) == list(range(len(COMPARISONS)))
    assert list(dict.fromkeys(table.claim)) == [c for c in order if c in REASONS]
    assert [line[1] for line in findings({})] == [c for c in order if c in REASONS]
    first = [line[3] for line in headline({}).splitlines() if line.startswith("| (")]
    assert first == sorted(first, key=order.index)


def test_headline_says_the_stricter_level_on_both_sides():
    first = lambda gain: headline(some(gain=gain)).splitlines()[2]
    assert "yes, also at the stricter level" in first(
        0.6
    ) and "the opposite, also at the stricter level" in first(-0.6)
    assert "undecided" in first(0.0) and "stricter" not in first(0.0)


def test_rebuilding_changes_nothing(tmp_path):
    records = some()
    write_tables(tmp_path, records)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    write_tables(tmp_path, records)
    assert (
        before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        and stale_tables(tmp_path, records) == []
    )


def test_changed_record_changes_the_table_and_is_noticed(tmp_path):
    records = some()
    write_tables(tmp_path, records)
    changed = copy.deepcopy(records)
    details = changed["cls20-unipre3d-2"]["details"]
    details["answers"] = (
        "b" + details["answers"][1:]
        if details["answers"][0] != "b"
        else "a" + details["answers"][1:]
    )
    assert tables(changed) != tables(records) and any(
        "effects.csv" in line for line in stale_tables(tmp_path, changed)
    )
    (tmp_path / "headline.md").unlink()
    assert any("headline.md" in line for line in stale_tables(tmp_path, records))


def test_committed_tables_are_what_the_committed_records_give():
    assert stale_tables() == []


def test_broken_record_is_an_error(tmp_path):
    write_json(
        tmp_path / "x.json", {k: v for k, v in record("cls20-scratch-0").items() if k != "seed"}
    )
    with pytest.raises(ValueError, match="x.json: expected 'seed'"):
        read_study(tmp_path)


def test_frame_holds_the_study_too(tmp_path):
    (tmp_path / "study").mkdir()
    write_json(tmp_path / "study" / "cls20-scratch-0.json", record("cls20-scratch-0"))
    frame = all_frame(tmp_path)
    assert list(frame.index) == ["cls20-scratch-0"] and frame["metrics.oa"].item() == 0.5
    assert all_frame(tmp_path / "none").empty and len(all_frame()) >= len(read_study())


def test_committed_study_records_belong_to_the_plan():
    rows = {r.key: r for budget in ("mini", "full") for r in plan(budget)}
    assert set(read_study()) <= set(rows)


def test_full_metrics_are_in_the_records_of_their_tasks():
    from unipre3d.tasks.metrics import SemanticScore

    known = {
        k
        for name in ("cls-shapes-mini", "part-shapes-mini", "inst-rooms-mini")
        for k in read_record(name)["metrics"]
    } | set(SemanticScore(2).compute())
    assert set(FULL_METRIC.values()) <= known and {
        r.metric for r in paper_table().itertuples() if full_key(r)
    } <= set(FULL_METRIC)


def test_labels_that_choose_are_counted():
    count = label_counts(read_study()).loc["cls20"]
    assert (count["train a class"], count["val a class"], count["test"]) == (20, 20, 1500)


def test_pairs_must_have_the_same_test_objects():
    records = some()
    records["cls20-unipre3d-1"]["details"]["true"] = records["cls20-unipre3d-1"]["details"]["true"][
        ::-1
    ]
    with pytest.raises(ValueError, match="expected the same test objects"):
        paired(records, COMPARISONS[0])


def test_rates_of_masked_pretraining_are_those_of_its_short_runs():
    short = lambda rate: {
        "row": dict(key=f"tune-pre-masked-{rate:g}", part="pre", arm="masked", start="none"),
        "values": {"lr": rate},
        "chosen": {"score": None},
    }
    probe = lambda rate, score: {
        "row": dict(
            key=f"tune-probe20-pre-masked-{rate:g}",
            part="probe20",
            arm="masked",
            start=f"tune-pre-masked-{rate:g}",
        ),
        "values": {"lr": 3e-3},
        "chosen": {"score": score},
    }
    runs = [
        x
        for rate, score in zip(MASKED_RATES, (0.2, 0.4, 0.3))
        for x in (short(rate), probe(rate, score))
    ]
    (row,) = chosen_rates({r["row"]["key"]: r for r in runs}).itertuples()
    assert (row.measurement, row.condition, row.chosen, row.edge) == (
        "pre",
        "masked",
        MASKED_RATES[1],
        "",
    )


def test_repeated_rows_of_every_committed_kind(tmp_path):
    records = read_study()
    rows = [
        next(k for k in records if k.startswith(start))
        for start in (
            "pre-point-",
            "pre-none-",
            "pre-unipre3d-",
            "rooms-none-",
            "probe20-",
            "cls20-",
            "tune-",
        )
    ]
    for key in rows:
        write_json(tmp_path / f"{key}.json", records[key])
    table = repeated(tmp_path, records)
    assert (
        set(table.row) == {k for k in rows if not k.startswith("tune-")}
        and (table.here == table.committed).all()
    )
    assert table.set_index("row").metric.to_dict()[rows[0]] == "psnr"


def test_late_rise_leaves_out_runs_without_validation():
    masked = record("pre-masked-0") | {
        "chosen": {"chosen_by": "last"},
        "history": {"train": {}, "val": {"step": []}},
    }
    assert len(late_rise({"pre-masked-0": masked})) == 0
