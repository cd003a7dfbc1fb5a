"""Scores against independent definitions: sets of points, hand-made cases, and limits that follow from the definition."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from unipre3d.tasks import metrics
from unipre3d.tasks.metrics import (
    ClassScore,
    Confusion,
    InstanceScore,
    Instances,
    PartScore,
    SemanticScore,
    average_precision,
    class_accuracy,
    class_iou,
    class_table,
    draw_confusion,
    mean_over_classes,
    overall_accuracy,
    own_parts,
    part_membership,
)

SEEDS = range(6)


def labels(seed, n=400, classes=7, ignore=-1):
    gen = torch.Generator().manual_seed(seed)
    truth = torch.randint(
        ignore, classes - 1, (n,), generator=gen
    )  # the last class never occurs in the truth
    pred = torch.where(
        torch.rand(n, generator=gen) < 0.5,
        truth.clamp(min=0),
        torch.randint(0, classes - (seed % 2), (n,), generator=gen),
    )
    return pred, truth


# ---- confusion, accuracy, Jaccard


@pytest.mark.parametrize("seed", SEEDS)
def test_confusion_counts_pairs(seed):
    pred, truth = labels(seed)
    matrix = Confusion(7, ignore=-1).update(pred, truth).compute()["confusion"]
    pairs = [(t, p) for t, p in zip(truth.tolist(), pred.tolist()) if t >= 0]
    assert all(int(matrix[t, p]) == pairs.count((t, p)) for t, p in product(range(7), repeat=2))
    assert int(matrix.sum()) == len(pairs)


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_equal_sets_of_points(seed):
    pred, truth = labels(seed)
    got = SemanticScore(7).update(pred, truth).compute()
    at = lambda x, k: {
        i for i, (v, t) in enumerate(zip(x.tolist(), truth.tolist())) if v == k and t >= 0
    }
    iou = [
        len(at(pred, k) & at(truth, k)) / len(u) if (u := at(pred, k) | at(truth, k)) else math.nan
        for k in range(7)
    ]
    acc = [
        len(at(pred, k) & at(truth, k)) / len(at(truth, k)) if at(truth, k) else math.nan
        for k in range(7)
    ]
    torch.testing.assert_close(got["iou"], torch.tensor(iou, dtype=torch.float64), equal_nan=True)
    torch.testing.assert_close(got["acc"], torch.tensor(acc, dtype=torch.float64), equal_nan=True)
    has = [x for x in iou if not math.isnan(x)]
    assert got["miou"] == pytest.approx(sum(has) / len(has)) and got["absent"] == 7 - len(has)
    counted = truth >= 0
    assert got["allacc"] == pytest.approx(float((pred == truth)[counted].double().mean()))


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_equal_torchmetrics_where_every_class_occurs(seed):
    gen = torch.Generator().manual_seed(seed)
    pred, truth = torch.randint(0, 5, (2, 300), generator=gen)
    truth[:5] = torch.arange(5)
    matrix = Confusion(5).update(pred, truth).matrix
    torch.testing.assert_close(
        class_iou(matrix).float(), multiclass_jaccard_index(pred, truth, 5, average="none")
    )
    torch.testing.assert_close(
        class_accuracy(matrix).float(), multiclass_accuracy(pred, truth, 5, average="none")
    )
    assert overall_accuracy(matrix) == pytest.approx(
        float(multiclass_accuracy(pred, truth, 5, average="micro"))
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_zero_convention_is_the_one_with_a_small_denominator(seed):
    pred, truth = labels(seed)
    score = SemanticScore(7, absent="zero").update(pred, truth)
    matrix = score.matrix.double()
    hit, target, union = (
        matrix.diagonal(),
        matrix.sum(1),
        matrix.sum(0) + matrix.sum(1) - matrix.diagonal(),
    )
    got = score.compute()
    assert got["miou"] == pytest.approx(float((hit / (union + 1e-10)).mean()), abs=1e-9)
    assert got["macc"] == pytest.approx(float((hit / (target + 1e-10)).mean()), abs=1e-9)
    assert got["allacc"] == pytest.approx(float(hit.sum() / (target.sum() + 1e-10)), abs=1e-9)


def test_absent_and_wrongly_predicted_are_not_the_same():
    truth = torch.tensor([0, 0, 1, 1])
    assert SemanticScore(3).update(truth, truth).compute()["miou"] == 1
    assert SemanticScore(3).update(torch.tensor([0, 2, 1, 1]), truth).compute()[
        "miou"
    ] == pytest.approx((0.5 + 1 + 0) / 3)


def test_batches_add_up_and_groups_are_means_of_their_classes():
    pred, truth = labels(3)
    whole = SemanticScore(7, groups=dict(a=[0, 1], b=[2, 6])).update(pred, truth).compute()
    pieces = SemanticScore(7, groups=dict(a=[0, 1], b=[2, 6]))
    for p, t in zip(pred.split(37), truth.split(37)):
        pieces.update(p, t)
    pieces = pieces.compute()
    assert torch.equal(whole["confusion"], pieces["confusion"]) and whole["miou_a"] == pieces[
        "miou_a"
    ] == pytest.approx(float(whole["iou"][:2].mean()))


def test_class_score_and_table_and_picture():
    got = ClassScore(3).update(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1])).compute()
    assert got["oa"] == 0.75 and got["macc"] == 0.75
    assert class_table(["a", "b", "c"], acc=class_accuracy(got["confusion"])).loc["a", "acc"] == 50
    assert [
        t.get_text() for t in draw_confusion(got["confusion"], ["a", "b", "c"]).get_yticklabels()
    ] == ["a", "b", "c"]
    assert mean_over_classes(torch.tensor([1.0, math.nan]), "zero") == 0.5


@pytest.mark.parametrize(
    "call, text",
    [
        (
            lambda: Confusion(3).update(torch.tensor([0, 3]), torch.tensor([0, 1])),
            "Confusion pred: expected labels in 0..2, found 3",
        ),
        (
            lambda: Confusion(3).update(torch.tensor([0, 1]), torch.tensor([0, -1])),
            "Confusion truth: expected labels in 0..2, found -1",
        ),
        (
            lambda: Confusion(3).update(torch.tensor([0]), torch.tensor([0, 1])),
            "as many predictions as labels",
        ),
        (
            lambda: Confusion(3).update(torch.rand(2), torch.tensor([0, 1])),
            "expected whole numbers",
        ),
        (
            lambda: SemanticScore(3).update(torch.tensor([0, 5]), torch.tensor([-1, 0])),
            "SemanticScore pred: expected labels in 0..2, found 5",
        ),
        (
            lambda: mean_over_classes(torch.ones(3), "nothing"),
            "absent: expected 'leave out' or 'zero', got 'nothing'",
        ),
        (lambda: PartScore(dict(mug=[0, 1])).compute(), "at least one shape"),
        (
            lambda: PartScore(dict(mug=[0, 1], cap=[2, 3])).update(
                torch.tensor([0]), torch.tensor([2]), torch.tensor([0]), torch.tensor([0])
            ),
            "found part 2 on a mug",
        ),
        (lambda: InstanceScore(2).compute(), "at least one scene"),
        (
            lambda: Instances(torch.ones(1, 4), torch.tensor([0]), torch.ones(1)),
            "Instances.mask: expected dtype torch.bool",
        ),
        (
            lambda: Instances(torch.ones(2, 4, dtype=torch.bool), torch.tensor([0]), torch.ones(1)),
            "Instances.label",
        ),
        (
            lambda: Instances(
                torch.ones(1, 4, dtype=torch.bool), torch.tensor([0]), torch.tensor([math.nan])
            ),
            "found NaN",
        ),
    ],
)
def test_errors_are_one_line(call, text):
    with pytest.raises(ValueError) as error:
        call()
    assert text in str(error.value) and "\n" not in str(error.value)


# ---- parts

PARTS = dict(table=[0, 1], mug=[2, 3, 4], chair=[5, 6, 7, 8])


def shapes(seed, size=7, n=30):
    gen = torch.Generator().manual_seed(seed)
    category = torch.randint(0, 3, (size,), generator=gen)
    batch = torch.arange(size).repeat_interleave(n)
    members = [torch.tensor(p) for p in PARTS.values()]
    draw = lambda: torch.cat(
        [
            members[c][torch.randint(max(1, len(members[c]) - (seed % 2)), (n,), generator=gen)]
            for c in category.tolist()
        ]
    )
    truth = draw()
    return (
        torch.where(torch.rand(len(truth), generator=gen) < 0.6, truth, draw()),
        truth,
        batch,
        category,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_part_scores_equal_the_plain_definition(seed):
    pred, truth, batch, category = shapes(seed)
    ious = []
    for b, kind in enumerate(category.tolist()):
        p, t = pred[batch == b], truth[batch == b]
        each = [
            1.0
            if not ((p == k) | (t == k)).any()
            else float(((p == k) & (t == k)).sum() / ((p == k) | (t == k)).sum())
            for k in list(PARTS.values())[kind]
        ]
        ious.append(sum(each) / len(each))
    ious = torch.tensor(ious)
    got = PartScore(PARTS).update(pred, truth, batch, category).compute()
    assert got["miou_i"] == pytest.approx(float(ious.mean()), abs=1e-6) and got["shapes"] == 7
    assert got["miou_c"] == pytest.approx(
        float(torch.stack([ious[category == k].mean() for k in category.unique()]).mean()), abs=1e-6
    )


def test_part_absent_from_truth_and_prediction_counts_one():
    one = torch.zeros(10, dtype=torch.long)
    assert (
        PartScore(dict(mug=[0, 1])).update(one, one, one, torch.tensor([0])).compute()["miou_i"]
        == 1
    )
    wrong = one.clone()
    wrong[0] = 1  # one point of a part that is not there
    assert PartScore(dict(mug=[0, 1])).update(wrong, one, one, torch.tensor([0])).compute()[
        "miou_i"
    ] == pytest.approx((0.9 + 0) / 2)


def test_foreign_parts_are_left_out_of_the_argmax_and_wrong_without_it():
    logits = torch.tensor([[0.0, 1, 9], [2, 1, 9]])
    assert own_parts(logits, torch.tensor([0, 0]), [[0, 1], [2]]).tolist() == [1, 0]
    assert own_parts(logits, torch.tensor([1, 0]), [[0, 1], [2]]).tolist() == [2, 0]
    truth, batch, category = torch.tensor([1, 0]), torch.tensor([0, 0]), torch.tensor([0])
    score = lambda pred: (
        PartScore(dict(a=[0, 1], b=[2])).update(pred, truth, batch, category).compute()["miou_i"]
    )
    assert score(torch.tensor([2, 0])) == 0.5 and score(torch.tensor([1, 0])) == 1
    assert part_membership([[0, 1], [2]]).tolist() == [[True, True, False], [False, False, True]]


def test_part_batches_and_unlabelled_points():
    pred, truth, batch, category = shapes(2)
    whole = PartScore(PARTS).update(pred, truth, batch, category).compute()
    halves = PartScore(PARTS)
    for keep, start in ((batch < 3, 0), (batch >= 3, 3)):
        halves.update(
            pred[keep],
            truth[keep],
            batch[keep] - start,
            category[start:] if start else category[:3],
        )
    assert halves.compute() == whole
    assert set(whole["category"]) == {list(PARTS)[k] for k in category.tolist()}
    hidden = truth.clone()
    hidden[::3] = -1
    keep = hidden >= 0
    assert (
        PartScore(PARTS, ignore=-1).update(pred, hidden, batch, category).compute()
        == PartScore(PARTS).update(pred[keep], truth[keep], batch[keep], category).compute()
    )


# ---- instances: known answers


def line(*pieces, n=1000):
    "Masks of stretches of a line of points."
    along = torch.arange(n)
    return (
        torch.stack([(along >= a) & (along < b) for a, b in pieces])
        if pieces
        else torch.zeros(0, n, dtype=torch.bool)
    )


def scene(truth, n=1000):
    "Labels of a line: (start, end, class, instance); -1 elsewhere."
    segment, instance = torch.full((2, n), -1)
    for a, b, kind, number in truth:
        segment[a:b], instance[a:b] = kind, number
    return segment, instance


def score(predictions, truth, classes=1, **keywords):
    "Predictions (start, end, class, confidence) on one scene."
    pred = Instances(
        line(*((a, b) for a, b, *_ in predictions)),
        torch.tensor([k for *_, k, _ in predictions], dtype=torch.long),
        torch.tensor([float(s) for *_, s in predictions]),
    )
    return InstanceScore(classes, **keywords).update(pred, *scene(truth)).compute()


TWO = [(0, 200, 0, 0), (300, 500, 0, 1)]


@pytest.mark.parametrize(
    "predictions, truth, ap25, ap50, mean",
    [
        ([(0, 200, 0, 0.9), (300, 500, 0, 0.8)], TWO, 1, 1, 1),  # perfect
        ([], TWO, 0, 0, 0),  # nothing
        ([(0, 200, 0, 0.9)], TWO, 0.5, 0.5, 0.5),  # one of two
        (
            [(0, 120, 0, 0.9), (300, 500, 0, 0.8)],
            TWO,
            1,
            1,
            (2 + 7 * 0.125) / 9,
        ),  # overlap 0.6: right at .5, .55; a confident error at the other 7
        (
            [(300, 500, 0, 0.9), (0, 120, 0, 0.8)],
            TWO,
            1,
            1,
            (2 + 7 * 0.5) / 9,
        ),  # the same with the error last
        ([(0, 100, 0, 0.9)], [(0, 200, 0, 0)], 1, 0, 0),  # exactly half is not more than half
        (
            [(0, 200, 0, 0.9), (0, 190, 0, 0.8)],
            TWO[:1],
            1,
            1,
            1,
        ),  # a twin after the truth: recall is full already
        (
            [(0, 190, 0, 0.9), (0, 200, 0, 0.8)],
            TWO[:1],
            1,
            1,
            1,
        ),  # the confident one counts, not the better one; 0.95 is enough for all nine
        (
            [(0, 150, 0, 0.9), (0, 200, 0, 0.8)],
            TWO[:1],
            1,
            1,
            (5 + 4 * 0.25) / 9,
        ),  # 0.75 > .5 .. .70; from .75 on the second one is the match
        (
            [(0, 200, 0, 0.5), (300, 500, 0, 0.5), (600, 800, 0, 0.5)],
            TWO + [(600, 800, 1, 2)],
            5 / 6,
            5 / 6,
            5 / 6,
        ),  # a tie is one point of the curve
    ],
)
def test_known_answers(predictions, truth, ap25, ap50, mean):
    got = score(predictions, truth, classes=2)
    assert (
        got["ap25_class"][0] == pytest.approx(ap25)
        and got["ap50_class"][0] == pytest.approx(ap50)
        and got["ap"][0] == pytest.approx(mean)
    )


def test_void_is_forgotten_and_other_classes_are_not():
    good, bad = (0, 200, 0, 0.5), (600, 800, 0, 0.9)
    assert score([good, bad], [TWO[0]])["map"] == 1  # on points without a label
    assert (
        score([good, bad], [TWO[0], (600, 800, 1, 1)], classes=2)["ap"][0] == 0.25
    )  # on another class: precision 0, then 1/2
    assert (
        score([good, bad], [TWO[0], (600, 800, 1, 1)], classes=2, skip=(1,))["ap"][0] == 1
    )  # on a class without instances
    got = score(
        [good, bad], [TWO[0], (600, 690, 1, 1)], classes=2
    )  # 90 of 200 on another class: 0.55 of it is void
    assert got["ap50_class"][0] == 1 and got["ap25_class"][0] == 1
    assert got["ap"][0] == pytest.approx(
        (1 + 8 * 0.25) / 9
    )  # forgotten while void exceeds the overlap: at 0.5 only


def test_small_regions():
    good = (0, 200, 0, 0.5)
    assert (
        score([good, (600, 699, 0, 0.9)], [TWO[0], (600, 900, 1, 1)], classes=2)["ap"][0] == 1
    )  # a prediction of 99 points
    assert (
        score([good, (600, 700, 0, 0.9)], [TWO[0], (600, 900, 1, 1)], classes=2)["ap"][0] == 0.25
    )  # of 100
    assert (
        score([good], [TWO[0], (600, 699, 0, 1)])["map"] == 1
    )  # a true instance of 99 points is not missed
    assert score([good], [TWO[0], (600, 700, 0, 1)])["map"] == 0.5  # one of 100 is
    got = score(
        [good, (600, 705, 0, 0.9)], [TWO[0], (600, 690, 0, 1), (690, 900, 1, 2)], classes=2
    )  # overlap 90 / 105 = 0.857 with a small one,
    assert got["ap"][0] == pytest.approx((8 + 0.25) / 9)  # forgotten up to 0.85, an error at 0.9
    small_hit = score(
        [good, (600, 700, 0, 0.9)], [TWO[0], (600, 690, 0, 1), (690, 900, 1, 2)], classes=2
    )
    assert small_hit["ap50_class"][0] == 1  # it hits a small one: forgotten
    assert score([(0, 50, 0, 0.9)], [(0, 50, 0, 0)], min_points=10)["map"] == 1


def test_one_prediction_takes_one_instance_at_low_overlap():
    truth = [(0, 200, 0, 0), (200, 400, 0, 1)]  # 0.5 of each
    got = score([(0, 400, 0, 0.9)], truth)
    assert got["ap25"] == 0.5 and got["ap50"] == 0


def test_classes_without_instances_are_left_out_and_unpredicted_ones_are_zero():
    got = score(
        [(0, 200, 0, 0.9)],
        [(0, 200, 0, 0), (300, 500, 1, 1)],
        classes=4,
        skip=(3,),
        groups=dict(first=[0], rest=[1, 2]),
    )
    assert (
        got["ap"][0] == 1
        and got["ap"][1] == 0
        and got["ap"][2:].isnan().all()
        and got["map"] == 0.5
    )
    assert got["map_first"] == 1 and got["ap50_rest"] == 0


def test_same_number_in_two_classes_is_two_instances():
    got = score(
        [(0, 200, 0, 0.9), (300, 500, 1, 0.9)], [(0, 200, 0, 7), (300, 500, 1, 7)], classes=2
    )
    assert got["map"] == 1


def test_empty_scenes_and_scenes_together():
    nothing = Instances(line(), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    total = InstanceScore(1).update(nothing, *scene([])).update(nothing, *scene([])).compute()
    assert math.isnan(total["map"])
    both = (
        InstanceScore(1)
        .update(Instances(line((0, 200)), torch.tensor([0]), torch.tensor([0.9])), *scene(TWO[:1]))
        .update(nothing, *scene(TWO[1:]))
        .compute()
    )
    assert both["map"] == 0.5


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_order_and_monotone_confidence_do_not_matter(seed):
    gen = torch.Generator().manual_seed(seed)
    start, length = (
        torch.randint(0, 700, (8,), generator=gen),
        torch.randint(90, 300, (8,), generator=gen),
    )
    mask, label, confidence = (
        line(*zip(start.tolist(), (start + length).tolist())),
        torch.randint(0, 2, (8,), generator=gen),
        torch.randperm(8, generator=gen) / 8.0,
    )
    truth = scene([(k * 150, k * 150 + 140, k % 2, k) for k in range(6)])
    order = torch.randperm(8, generator=gen)
    plain = InstanceScore(2).update(Instances(mask, label, confidence), *truth).compute()
    mixed = (
        InstanceScore(2)
        .update(Instances(mask[order], label[order], confidence[order].exp()), *truth)
        .compute()
    )
    torch.testing.assert_close(
        torch.stack([plain["ap"], plain["ap50_class"], plain["ap25_class"]]),
        torch.stack([mixed["ap"], mixed["ap50_class"], mixed["ap25_class"]]),
        equal_nan=True,
    )
    assert plain["ap50"] <= 1 and plain["map"] <= plain["ap50"] + 1e-12


# ---- by another road: the whole definition with sets of points, and the area by enumerating thresholds


def area(true, score, missed):
    points = [(0.0, 1.0)]
    for t in sorted(set(score), reverse=True):
        kept = [y for y, s in zip(true, score) if s >= t]
        points.append((sum(kept) / (sum(true) + missed), sum(kept) / len(kept)))
    return sum((r1 - r0) * (p0 + p1) / 2 for (r0, p0), (r1, p1) in zip(points, points[1:]))


@pytest.mark.parametrize("seed", SEEDS)
def test_average_precision_equals_the_area_over_all_thresholds(seed):
    gen = torch.Generator().manual_seed(seed)
    true, confidence = (
        torch.rand(20, generator=gen) < 0.6,
        torch.randint(0, 9, (20,), generator=gen) / 9,
    )
    for missed in (0, 4):
        assert average_precision(true, confidence, missed) == pytest.approx(
            area(true.tolist(), confidence.tolist(), missed)
        )


def plain_ap(scenes, kind, tau, min_points=100):
    "One class at one overlap. A scene is (masks as sets, classes, confidences, true instances as {(class, number): set}, void points)."
    true, confidence, missed, there = [], [], 0, False
    for masks, kinds, scores, instances, void in scenes:
        own = sorted(
            [(s, m) for m, k, s in zip(masks, kinds, scores) if k == kind and len(m) >= min_points],
            key=lambda x: -x[0],
        )
        large = [i for (k, _), i in sorted(instances.items()) if k == kind and len(i) >= min_points]
        small = set().union(
            *(i for (k, _), i in instances.items() if k == kind and len(i) < min_points)
        )
        there |= bool(large)
        taken = set()
        for i in large:
            hits = [
                n
                for n, (_, m) in enumerate(own)
                if n not in taken and len(m & i) / len(m | i) > tau
            ]
            true += [n == hits[0] for n in hits]
            confidence += [own[n][0] for n in hits]
            taken.update(hits[:1])
            missed += not hits
        for s, m in own:
            if any(len(m & i) / len(m | i) > tau for (k, _), i in instances.items() if k == kind):
                continue
            if len(m & (void | small)) / len(m) <= tau:
                true.append(False)
                confidence.append(s)
    return (area(true, confidence, missed) if true else 0.0) if there else math.nan


@pytest.mark.parametrize("seed", SEEDS)
def test_instance_scores_equal_the_definition_over_scenes(seed):
    gen, ours, plain = torch.Generator().manual_seed(seed), InstanceScore(4, skip=(2,)), []
    for _ in range(3):
        cuts = torch.cat(
            [
                torch.tensor([0]),
                torch.randperm(1500, generator=gen)[:7].sort().values,
                torch.tensor([1500]),
            ]
        )
        instance = torch.repeat_interleave(torch.arange(8), cuts[1:] - cuts[:-1])
        kinds = torch.randint(-1, 4, (8,), generator=gen)
        which, shift = (
            torch.randint(8, (16,), generator=gen),
            torch.randint(-90, 91, (2, 16), generator=gen),
        )
        mask = line(
            *zip((cuts[which] + shift[0]).tolist(), (cuts[which + 1] + shift[1]).tolist()), n=1500
        )
        label, confidence = (
            torch.where(torch.rand(16, generator=gen) < 0.7, kinds[which], 0).clamp(min=0),
            torch.randint(1, 7, (16,), generator=gen) / 7,
        )
        ours.update(Instances(mask, label, confidence), kinds[instance], instance)
        sets = lambda m: set(m.nonzero().flatten().tolist())
        instances = {
            (k, n): sets(instance == n) for n, k in enumerate(kinds.tolist()) if k in (0, 1, 3)
        }
        plain.append(
            (
                [sets(m) for m in mask],
                label.tolist(),
                confidence.tolist(),
                instances,
                set(range(1500)) - set().union(*instances.values()),
            )
        )
    got = ours.compute()
    want = {
        tau: [plain_ap(plain, kind, tau) for kind in (0, 1, 3)] for tau in (0.25, *metrics.OVERLAPS)
    }
    torch.testing.assert_close(
        got["ap25_class"][[0, 1, 3]],
        torch.tensor(want[0.25], dtype=torch.float64),
        equal_nan=True,
        rtol=1e-6,
        atol=1e-6,
    )
    torch.testing.assert_close(
        got["ap50_class"][[0, 1, 3]],
        torch.tensor(want[0.5], dtype=torch.float64),
        equal_nan=True,
        rtol=1e-6,
        atol=1e-6,
    )
    torch.testing.assert_close(
        got["ap"][[0, 1, 3]],
        torch.tensor([want[t] for t in metrics.OVERLAPS], dtype=torch.float64).mean(0),
        equal_nan=True,
        rtol=1e-6,
        atol=1e-6,
    )


def test_overlaps_of_map_are_nine():
    assert metrics.OVERLAPS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)


def test_a_shape_without_a_labelled_point_has_no_part_score():
    row = torch.tensor([0, 0, 1, 1])
    score = PartScore(dict(mug=[0, 1], cap=[2, 3]), ignore=-1).update(
        torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, -1, -1]), row, torch.tensor([0, 1])
    )
    got = score.compute()
    assert (
        got["shapes"] == 1
        and got["category"] == {"mug": got["miou_i"]}
        and got["miou_i"] == got["miou_c"] == 0.25
    )
    with pytest.raises(ValueError, match="expected at least one shape with a labelled point"):
        PartScore(dict(mug=[0, 1]), ignore=-1).update(
            row, row * 0 - 1, row * 0, torch.tensor([0])
        ).compute()
