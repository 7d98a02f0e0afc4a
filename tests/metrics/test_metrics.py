import math
import warnings

import pytest
import torch
from helpers import distributed_parts
from helpers.operations import Watch
from helpers.processes import run_in_processes
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from dino_head import DINOLoss, FactoredLogits, dino_loss
from dino_head.functional._outputs import as_token_outputs
from dino_head.metrics import DINOStatistics, KNNAccuracy, RankMe
from dino_head.metrics._neighbours import nearest

K, D = 24, 6


def sides(samples=5, teacher_views=2, student_views=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(K, D, generator=generator)
    z = [F.normalize(torch.randn(v, samples, D, generator=generator), dim=-1) for v in (teacher_views, student_views)]
    return FactoredLogits(z[0], prototypes), FactoredLogits(z[1], prototypes + 0.1)


def by_definition(teacher, student, center, teacher_temp, student_temp):
    """Plain loops in float64."""
    p = ((teacher.double() - center) / teacher_temp).softmax(-1)
    q = (student.double() / student_temp).softmax(-1)
    entropies = {"teacher": [], "student": []}
    divergences, winners = [], set()
    for b in range(p.shape[1]):
        for t in range(len(p)):
            entropies["teacher"].append(-sum(x * math.log(x) for x in p[t, b].tolist()))
            winners.add(int(p[t, b].argmax()))
            for s in range(len(q)):
                if s != t:
                    pairs = zip(p[t, b].tolist(), q[s, b].tolist(), strict=True)
                    divergences.append(sum(x * math.log(x / y) for x, y in pairs))
        entropies["student"] += [-sum(x * math.log(x) for x in q[s, b].tolist()) for s in range(len(q))]
    mean = p.mean(dim=(0, 1)).tolist()
    return {
        "teacher_entropy": sum(entropies["teacher"]) / len(entropies["teacher"]),
        "student_entropy": sum(entropies["student"]) / len(entropies["student"]),
        "kl": sum(divergences) / len(divergences),
        "prototypes_used": len(winners) / K,
        "prototype_perplexity": math.exp(-sum(x * math.log(x) for x in mean)),
        "rows": p.shape[0] * p.shape[1],
        "output_dim": K,
    }


OPTIONS = {"center": torch.linspace(-1, 1, K), "teacher_temp": 0.3, "student_temp": 0.5}


@pytest.mark.parametrize("kind", ["logits", "lists of logits", "factored"])
def test_the_statistics_are_what_their_definitions_say(kind):
    teacher, student = sides()
    given = {
        "logits": (teacher.logits(), student.logits()),
        "lists of logits": (list(teacher.logits()), list(student.logits())),
        "factored": (teacher, student),
    }[kind]
    statistics = DINOStatistics(K)
    statistics.update(*given, **OPTIONS)
    expected = by_definition(teacher.logits(), student.logits(), *OPTIONS.values())
    for name in ("teacher_entropy", "student_entropy"):
        expected[f"{name}_normalized"] = expected[name] / math.log(K)
    expected["loss"] = expected["teacher_entropy"] + expected["kl"]
    expected["loss_normalized"] = expected["loss"] / math.log(K)
    values = {name: value.item() for name, value in statistics.compute().items()}
    assert values == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_one_view_on_each_side_counts_as_its_own_pair():
    """Such as masked patches; with more student views, the same view does not count."""
    teacher, student = (side.logits() for side in sides(samples=9, teacher_views=1, student_views=1))
    statistics = DINOStatistics(K)
    statistics.update(teacher, student, **OPTIONS)
    values = statistics.compute()
    p = ((teacher[0].double() - OPTIONS["center"]) / OPTIONS["teacher_temp"]).softmax(-1)
    log_q = (student[0].double() / OPTIONS["student_temp"]).log_softmax(-1)
    kl = sum(F.kl_div(log_q[n], p[n], reduction="sum") for n in range(9)) / 9
    assert values["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert values["loss"].item() == pytest.approx(-(p * log_q).sum(-1).mean().item(), rel=1e-5)
    statistics.reset()
    statistics.update(teacher, torch.cat([student, torch.zeros_like(student)]), **OPTIONS)
    assert statistics.compute()["loss"].item() == pytest.approx(math.log(K), rel=1e-6)  # of the uniform view alone


@pytest.mark.parametrize("factored", [True, False])
def test_no_rows_add_nothing(factored):
    """A batch without masked patches, in the loss's internal form."""
    sides = [
        as_token_outputs(FactoredLogits(torch.zeros(n, D), torch.ones(K, D)) if factored else torch.zeros(n, K))
        for n in (3, 0)
    ]
    statistics = DINOStatistics(K)
    statistics.update(sides[1], sides[1])
    assert not any(value.any() for value in statistics.sums().values())
    statistics.update(sides[0], sides[0])
    statistics.update(sides[1], sides[1])
    assert statistics.compute()["rows"] == 3
    assert statistics.compute()["loss"].item() == pytest.approx(math.log(K))


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_entropy_and_kl_are_the_loss(centering):
    teacher, student = sides()
    loss = DINOLoss(K, centering=centering)
    loss(teacher, student)  # moves the center
    center = loss.center_for(teacher, 0.07).clone()
    statistics = DINOStatistics(K)
    statistics.update(teacher, student, center=center, teacher_temp=0.07, student_temp=0.1)
    values = statistics.compute()
    expected = loss(teacher, student)
    torch.testing.assert_close(values["teacher_entropy"] + values["kl"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values["loss"], expected, rtol=1e-5, atol=1e-6)


def test_of_factored_logits_a_bounded_number_of_rows_is_multiplied():
    teacher, student = sides(samples=41)
    statistics = DINOStatistics(K, max_rows=60)  # 10 samples of 6 views
    with Watch() as watch:
        statistics.update(teacher, student, **OPTIONS)
    assert watch.largest == 4 * 10 * K
    chosen = torch.arange(0, 41, 40 / 9).long()  # evenly, the first and the last among them
    assert chosen.tolist() == [0, 4, 8, 13, 17, 22, 26, 31, 35, 40]
    of_them = DINOStatistics(K)
    of_them.update(teacher.logits()[:, chosen], student.logits()[:, chosen], **OPTIONS)
    torch.testing.assert_close(statistics.compute(), of_them.compute())
    assert statistics.compute()["rows"] == 20


def test_at_least_one_sample_is_taken():
    statistics = DINOStatistics(K, max_rows=1)
    statistics.update(*sides())
    assert statistics.compute()["rows"] == 2


@pytest.mark.parametrize("factored", [True, False])
def test_large_logits_go_in_blocks(factored):
    z, prototypes = F.normalize(torch.randn(2, 80, 8), dim=-1), torch.randn(65536, 8)
    out = FactoredLogits(z, prototypes) if factored else z @ prototypes.T
    statistics = DINOStatistics(65536, max_rows=1000)
    with Watch() as watch:
        statistics.update(out, out)
    assert watch.largest * 4 <= 2**25 < 2 * 80 * 65536 * 4
    expected = dino_loss(out, out)
    torch.testing.assert_close(statistics.compute()["loss"], expected, rtol=1e-5, atol=1e-5)


def test_batches_add_up_whatever_their_sizes():
    teacher, student = (side.logits() for side in sides(samples=9))
    whole, parts = DINOStatistics(K), DINOStatistics(K)
    whole.update(teacher, student)
    for part in (slice(0, 2), slice(2, 9)):
        parts.update(teacher[:, part], student[:, part])
    torch.testing.assert_close(whole.compute(), parts.compute())
    parts.reset()
    parts.update(teacher[:, :1], student[:, :1])
    assert parts.compute()["rows"] == 2


def test_low_precision_and_autocast_are_measured_in_float32():
    teacher, student = sides()
    expected = DINOStatistics(K)
    expected.update(teacher, student)
    statistics = DINOStatistics(K)
    with torch.autocast("cpu", torch.bfloat16):
        statistics.update(teacher, student)
    torch.testing.assert_close(statistics.compute(), expected.compute(), rtol=0, atol=0)
    statistics.reset()
    statistics.update(teacher.logits().bfloat16(), student.logits().bfloat16())
    assert statistics.compute()["loss"].dtype == torch.float32
    torch.testing.assert_close(statistics.compute()["loss"], expected.compute()["loss"], rtol=0.02, atol=0)


def test_the_kl_of_many_samples_keeps_its_digits():
    logits = sides()[0].logits()[:1]
    batch = logits.repeat(2, 1, 1), logits.repeat(4, 1, 1) + 0.01 * sides()[1].logits()
    one, many = DINOStatistics(K), DINOStatistics(K)
    one.update(*batch, teacher_temp=0.1)
    for _ in range(3000):
        many.update(*batch, teacher_temp=0.1)
    assert 0 < one.compute()["kl"] < 0.02 * one.compute()["loss"]
    torch.testing.assert_close(many.compute()["kl"], one.compute()["kl"], rtol=1e-5, atol=0)


def test_a_masked_prototype_counts_as_0():
    teacher, student = (side.logits() for side in sides())
    expected, masked = DINOStatistics(K), DINOStatistics(K)
    for logits in (teacher, student):
        logits[..., 0] = -1e4
    expected.update(teacher, student)
    for logits in (teacher, student):
        logits[..., 0] = -math.inf
    masked.update(teacher, student)
    torch.testing.assert_close(masked.compute(), expected.compute())


def test_no_gradient_is_kept():
    teacher, student = (FactoredLogits(*(t.requires_grad_() for t in side)) for side in sides())
    statistics = DINOStatistics(K)
    statistics.update(teacher, student)
    assert not any(value.requires_grad for value in statistics.metric_state.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 7), torch.zeros(2, 3, 7)), r"made for 24 prototypes \(output_dim\), got 7"),
        ((torch.zeros(2, 3, K), torch.zeros(2, 4, K)), "must have the same B and K"),
        ((torch.zeros(2, 0, K), torch.zeros(2, 0, K)), "needs at least one sample"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DINOStatistics(K).update(*arguments)


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="output_dim must be an integer >= 2"):
        DINOStatistics(1)
    with pytest.raises(ValueError, match="max_rows must be an integer >= 1"):
        DINOStatistics(4, max_rows=0)
    with pytest.raises(ValueError, match="center must be a number or have one value for each of K = 24"):
        DINOStatistics(K).update(*sides(), center=torch.zeros(3))
    with pytest.raises(ValueError, match=r"teacher_temp must be a number in \(0, inf\]"):
        DINOStatistics(K).update(*sides(), teacher_temp=0)


# RankMe


def rank_by_definition(features):
    sigma = torch.linalg.svdvals(features.double())
    p = sigma / sigma.sum() + 1e-7
    return math.exp(-sum(x * math.log(x) for x in p.tolist() if x > 0))


@pytest.mark.parametrize("shape", [(200, 12), (7, 12), (3, 50, 12)])
def test_rankme_is_the_papers_formula(shape):
    features = torch.randn(shape) * torch.logspace(0, -3, 12)
    rank = RankMe(12)
    for part in features.flatten(end_dim=-2).split(60):
        rank.update(part)
    assert rank.compute().item() == pytest.approx(rank_by_definition(features.flatten(end_dim=-2)), rel=1e-5)


def test_one_direction_has_rank_1_also_in_many_dimensions():
    rank = RankMe(512)
    rank.update(torch.randn(1000, 1) * torch.randn(512))
    assert rank.compute() == pytest.approx(1, abs=2e-3)
    rank.reset()
    rank.update(torch.zeros(9, 512))
    assert rank.compute() == pytest.approx(1, abs=2e-3)


def test_rankme_refuses_what_it_cannot_measure():
    rank = RankMe(4)
    with pytest.raises(ValueError, match=r"made for features \(..., 4\) \(num_features\), got \(2, 5\)"):
        rank.update(torch.zeros(2, 5))
    rank.update(torch.tensor([[0.0, 1, 2, 3], [0, 1, 2, math.inf]]))
    with pytest.raises(ValueError, match="1 of 2 features contain NaN or inf"):
        rank.compute()
    with pytest.raises(ValueError, match="num_features must be an integer >= 1"):
        RankMe(0)


# kNN


def clusters(samples=120, classes=(3, 7, -2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes)[torch.randint(len(classes), (samples,), generator=generator)]
    centers = torch.randn(100, D, generator=torch.Generator().manual_seed(9))
    return centers[labels] + 1.3 * torch.randn(samples, D, generator=generator), labels


def vote_by_hand(voters, labels, sample, k, temperature, excluded=()):
    """The definition, one sample at a time, in float64."""
    similarity = [(float(F.cosine_similarity(sample.double(), v.double(), dim=0)), i) for i, v in enumerate(voters)]
    nearest = sorted((s, i) for s, i in similarity if i not in excluded)[-k:]
    votes = {}
    for s, i in nearest:
        votes[int(labels[i])] = votes.get(int(labels[i]), 0) + math.exp(s / temperature)
    return max(votes, key=votes.get)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (120, 0.07), (20, 1.0), (20, 0.001)])
def test_knn_equals_brute_force(k, temperature):
    voters, labels = clusters()
    samples, truth = clusters(60, seed=1)
    knn = KNNAccuracy(voters, labels, k, temperature)
    for part in torch.arange(60).split(25):
        knn.update(samples[part], truth[part])
    # exp(1 / 0.001) overflows also in float64; the nearest alone decides there
    of_each = [vote_by_hand(voters, labels, sample, k, max(temperature, 0.002)) for sample in samples]
    expected = sum(vote == int(label) for vote, label in zip(of_each, truth, strict=True)) / 60
    assert 0.4 < expected < 0.95
    assert knn.compute().item() == pytest.approx(expected)


def test_knn_equals_scikit_learn():
    voters, labels = clusters(400)
    samples, truth = clusters(200, seed=1)
    knn = KNNAccuracy(voters, labels, k=20)
    knn.update(samples, truth)

    def weights(distances):
        return torch.from_numpy((1 - distances) / 0.07).exp().numpy()

    theirs = KNeighborsClassifier(20, metric="cosine", weights=weights).fit(voters.numpy(), labels.numpy())
    assert knn.compute().item() == pytest.approx(theirs.score(samples.numpy(), truth.numpy()))


def test_neighbours_of_the_own_group_do_not_vote():
    voters, labels = clusters()
    samples, truth = clusters(60, seed=1)
    groups, of_samples = torch.arange(120) % 11, torch.arange(60) % 11
    knn = KNNAccuracy(voters, labels, 5, groups=groups)
    knn.update(samples, truth, of_samples)
    of_each = [
        vote_by_hand(voters, labels, sample, 5, 0.07, excluded=(groups == group).nonzero().flatten().tolist())
        for sample, group in zip(samples, of_samples, strict=True)
    ]
    expected = sum(vote == int(label) for vote, label in zip(of_each, truth, strict=True)) / 60
    assert knn.compute().item() == pytest.approx(expected)


def test_groups_take_leakage_away():
    """Features that know the patient and nothing else: leaked labels give 100%, fair ones chance."""
    patients = torch.arange(40).repeat_interleave(5)
    labels = torch.randint(2, (40,), generator=torch.Generator().manual_seed(0))[patients]
    features = torch.eye(40)[patients] + 0.01 * torch.randn(200, 40, generator=torch.Generator().manual_seed(1))
    leaking, fair = KNNAccuracy(features, labels, 4), KNNAccuracy(features, labels, 4, groups=patients)
    leaking.update(features, labels)
    fair.update(features, labels, patients)
    assert leaking.compute() == 1
    assert fair.compute() < 0.7


def test_a_group_with_fewer_than_k_others_still_gets_a_vote():
    voters = torch.tensor([[1.0, 0], [0.9, 0.1], [0.0, 1]])
    knn = KNNAccuracy(voters, torch.tensor([0, 0, 1]), k=3, groups=torch.tensor([5, 5, 6]))
    knn.update(torch.tensor([[1.0, 0]]), torch.tensor([1]), torch.tensor([5]))
    assert knn.compute() == 1
    alone = KNNAccuracy(voters, torch.tensor([0, 0, 1]), k=3, groups=torch.tensor([5, 5, 5]))
    alone.update(torch.tensor([[1.0, 0]]), torch.tensor([1]), torch.tensor([5]))
    with pytest.raises(ValueError, match="1 of 1 samples have no neighbour outside of their own group"):
        alone.compute()


def test_similarities_stay_within_their_memory():
    voters, _ = clusters(1000)
    samples, _ = clusters(500, seed=1)
    with Watch() as watch:
        in_chunks = nearest(samples, voters, 20, chunk_bytes=4 * 1000 * 8)
    assert watch.largest == max(1000 * 8, 500 * 20)  # a chunk, or the result
    assert all(map(torch.equal, in_chunks, nearest(samples, voters, 20)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 121}, "k=121 voters are needed, got 120"),
        ({"labels": torch.full((120,), 4)}, "all 120 voters have the label 4"),
        ({"labels": torch.zeros(120)}, r"voters must have integer labels \(N,\).* got \(120,\) in torch.float32"),
        ({"labels": torch.zeros(119, dtype=torch.long)}, "one for each of the 120 features, got .119,."),
        ({"groups": torch.zeros(3, dtype=torch.long)}, "voters must have integer groups"),
        ({"features": torch.zeros(0, D)}, "of at least one sample, got .0, 6."),
        ({"features": torch.full((120, D), math.nan)}, "120 of 120 features of the voters contain NaN or inf"),
        ({"features": torch.zeros(120, D, 2)}, r"floating-point features \(N, D\)"),
        ({"k": 0}, "k must be an integer >= 1"),
        ({"temperature": 0.0}, "temperature must be a number in"),
    ],
)
def test_voters_that_cannot_vote(change, message):
    features, labels = clusters()
    with pytest.raises(ValueError, match=message):
        KNNAccuracy(**{"features": features, "labels": labels, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(60, 5)}, "features of width 6, as the voters, got 5"),
        ({"features": torch.full((60, D), math.inf)}, "60 of 60 features of the samples contain NaN or inf"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "samples must have integer labels"),
        ({"groups": torch.zeros(60, dtype=torch.long)}, "the samples have groups and the voters have none"),
    ],
)
def test_samples_that_do_not_fit(change, message):
    features, labels = clusters(60)
    knn = KNNAccuracy(*clusters())

    def classify():
        knn.update(**{"features": features, "labels": labels, **change})
        knn.compute()  # raises the errors that depend on values

    with pytest.raises(ValueError, match=message):
        classify()


# All of them


METRICS = {
    "statistics": (lambda: DINOStatistics(K), lambda: sides()),
    "statistics of logits": (lambda: DINOStatistics(K), lambda: [side.logits() for side in sides()]),
    "rank": (lambda: RankMe(D), lambda: (clusters()[0],)),
    "knn": (lambda: KNNAccuracy(*clusters(), k=5), lambda: clusters(60, seed=1)),
}
CONVERSIONS = {
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "to a device and a type": lambda module: module.to("cpu", torch.float16),
}


def converted(arguments, dtype):
    def convert(value):
        if isinstance(value, FactoredLogits):
            return FactoredLogits(*map(convert, value))
        return value.to(dtype) if value.is_floating_point() else value

    return [convert(value) for value in arguments]


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("name", METRICS)
def test_a_metric_in_a_converted_module_has_the_same_values_bitwise(name, conversion):
    make, arguments = METRICS[name]
    expected, module = make(), torch.nn.ModuleDict({"metric": make()})
    CONVERSIONS[conversion](module)
    for _ in range(300):  # more than the integers of bfloat16
        expected.update(*arguments())
        module["metric"].update(*arguments())
    CONVERSIONS[conversion](module)  # the state as well
    torch.testing.assert_close(module["metric"].compute(), expected.compute(), rtol=0, atol=0)
    assert len({value.dtype for value in module["metric"].metric_state.values()}) == 1
    module["metric"].reset()
    module["metric"].update(*arguments())
    expected.reset()
    expected.update(*arguments())
    torch.testing.assert_close(module["metric"].compute(), expected.compute(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", METRICS)
def test_inputs_of_any_precision_are_measured_in_float32(name, dtype):
    make, arguments = METRICS[name]
    given, expected = make(), make()
    inputs = converted(arguments(), dtype)
    given.update(*inputs)
    expected.update(*converted(inputs, torch.float32))
    torch.testing.assert_close(given.compute(), expected.compute(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METRICS)
def test_the_default_type_does_not_change_the_values(name):
    """Lightning changes it during the steps of bf16-true, and while a module is made."""
    make, arguments = METRICS[name]
    expected, inputs = make(), arguments()
    expected.update(*inputs)
    torch.set_default_dtype(torch.bfloat16)
    try:
        metric = make() if name != "knn" else expected.clone()  # made of random voters
        metric.reset()
        metric.update(*inputs)
        found = metric.compute()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected.compute(), rtol=0, atol=0)


def test_set_dtype_still_converts_for_devices_without_float64():
    rank = RankMe(D).set_dtype(torch.float32)
    rank.update(clusters()[0])
    assert rank.products.dtype == torch.float32
    assert rank.compute().item() == pytest.approx(rank_by_definition(clusters()[0]), rel=1e-3)


@pytest.mark.distributed
def test_two_processes_equal_one(tmp_path):
    teacher, student = sides(samples=9)
    torch.save((teacher, student, clusters(), clusters(61, seed=1)), tmp_path / "input.pt")
    ranks = run_in_processes(distributed_parts.metrics_of_my_samples, tmp_path)
    one = distributed_parts.measure(slice(None), tmp_path)
    for rank in ranks:
        torch.testing.assert_close(rank, one)


def test_plots():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import matplotlib.pyplot as plt
    statistics, rank, knn = DINOStatistics(K), RankMe(D), KNNAccuracy(*clusters())
    statistics.update(*sides())
    rank.update(clusters()[0])
    knn.update(*clusters(60))
    for metric in (statistics, rank, knn):
        _, axes = metric.plot()
        assert axes.has_data()
        _, axes = metric.plot([metric.compute(), metric.compute()])
        assert len(axes.lines) >= 1
    _, axes = statistics.plot()
    assert [line.get_ydata()[0] for line in axes.lines][-1] == pytest.approx(math.log(K))
    plt.close("all")
