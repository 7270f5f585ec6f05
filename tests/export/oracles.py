"""The papers' equations as plain loops over NumPy arrays, one picture at a time.

Independent of `export.reducers`: read this beside the paper, and the tensors beside this. Each
takes features [1+P, D], scores [P] and keys [1+P, Dk], and returns what the tensors must say.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Answer:
    tokens: list = field(default_factory=list)
    origin: list = field(default_factory=list)
    assignment: dict = field(default_factory=dict)
    order: list | None = None
    worth: list | None = None


def cosine(a, b):
    length = np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())
    return float((a * b).sum() / length) if length > 0 else 0.0


def by_score(scores):
    return sorted(range(len(scores)), key=lambda patch: (-scores[patch], patch))


def visionzip(features, scores, keys, dominant, contextual, merge):
    answer, class_token, x, key = Answer(), features[0], features[1:], keys[1:]
    kept = sorted(by_score(scores)[: dominant - 1])
    answer.tokens.append(class_token)
    answer.origin.append(-1)
    for patch in kept:
        answer.assignment[patch] = len(answer.tokens)
        answer.tokens.append(x[patch])
        answer.origin.append(patch)

    left = [patch for patch in range(len(scores)) if patch not in kept]
    if contextual == 0:
        answer.assignment.update(dict.fromkeys(left, -1))
        return answer
    step = max(1, len(left) // contextual)
    targets = left[::step][:contextual]
    members = {target: [] for target in targets}
    for patch in left:
        if patch not in targets:
            # max() returns the first of equals.
            target = max(targets, key=lambda t: cosine(key[patch], key[t]))
            members[target].append(x[patch])
            answer.assignment[patch] = -(dominant + targets.index(target) + 2)
    for target in targets:
        joined = members[target]
        if merge == "mean":
            token = sum(joined, x[target]) / (1 + len(joined))
        else:
            token = x[target] + (sum(joined) / len(joined) if joined else 0.0)
        answer.assignment[target] = len(answer.tokens)
        answer.tokens.append(token)
        answer.origin.append(-1)
    return answer


def prumerge(features, scores, keys, budget, plus=False, ratio=0.0, merge="sum"):
    answer, x, key, count = Answer(), features[1:], keys[1:], len(scores)
    first, third = np.percentile(scores, 25), np.percentile(scores, 75)
    outliers = sum(1 for a in scores if a > third + 1.5 * (third - first))
    share = ratio or outliers / count
    least, room = (1, budget) if merge == "none" else (0, budget - 1)
    kept = by_score(scores)[: max(least, int(count * share))]
    if plus:
        step = int(1 / (share or 1 / count)) // 3
        grid = [patch for patch in range(0, count - 1, max(1, step)) if patch not in kept]
        left = max(0, room - len(kept))
        strongest = sorted(grid, key=lambda patch: (-scores[patch], patch))[:left]
        kept = kept + sorted(strongest)
    kept = kept[:room]

    for patch in kept:
        others = [other for other in range(count) if other != patch]
        others.sort(key=lambda other: (-cosine(key[patch], key[other]), other))
        near = [] if merge == "none" else others[:32]
        added = sum((scores[j] * x[j] for j in near), np.zeros_like(x[patch]))
        if merge == "average":
            added = added / max(sum(scores[j] for j in near), 1e-12)
        answer.assignment[patch] = len(answer.tokens)
        answer.tokens.append(x[patch] + added)
        answer.origin.append(patch)
    if merge == "none":
        return answer
    pruned = [patch for patch in range(count) if patch not in kept]
    for patch in pruned:
        answer.assignment[patch] = -(len(kept) + 2)
    answer.tokens.append(sum((scores[j] * x[j] for j in pruned), np.zeros_like(x[0])))
    answer.origin.append(-1)
    return answer


def uniform(features, budget):
    count, answer = len(features) - 1, Answer()
    for i in range(budget):
        keep(answer, features, int(np.floor((i + 0.5) * count / budget)))
    return answer


def uniform_grid(features, rows, columns):
    side, answer = int(np.sqrt(len(features) - 1)), Answer()
    for row in range(rows):
        for column in range(columns):
            y, x = np.floor((row + 0.5) * side / rows), np.floor((column + 0.5) * side / columns)
            keep(answer, features, int(y * side + x))
    return answer


def top_attention(features, scores, budget):
    best, answer = by_score(scores)[:budget], Answer(order=[], worth=[])
    for patch in sorted(best):
        keep(answer, features, patch)
        answer.order.append(best.index(patch))
        answer.worth.append(scores[patch])
    return answer


def keep(answer, features, patch):
    answer.assignment[patch] = len(answer.tokens)
    answer.tokens.append(features[1 + patch])
    answer.origin.append(patch)


def pool(features, rows, columns):
    side, answer = int(np.sqrt(len(features) - 1)), Answer()
    for row in range(rows):
        for column in range(columns):
            cell = [
                y * side + x
                for y in range(side)
                for x in range(side)
                if y * rows // side == row and x * columns // side == column
            ]
            for patch in cell:
                answer.assignment[patch] = -(len(answer.tokens) + 2)
            answer.tokens.append(sum(features[1 + patch] for patch in cell) / len(cell))
            answer.origin.append(-1)
    return answer


NEAR_TIE = 1e-4
"""Gains this close are equal but for rounding: two patches that cover only each other tie."""


def take(value, left, picked, follow):
    """Pick the first of the best, or, among near ties, what the tensors picked."""
    best = max(left, key=lambda j: value[j])
    n = len(picked)
    if follow is not None and n < len(follow):
        assert value[follow[n]] >= value[best] - NEAR_TIE
        best = follow[n]
    picked.append(best)
    return best


def scope(x, scores, budget, alpha, picks_per_step, coverage, merge, merge_from, follow=None):
    count = len(x)
    similar = np.array([[max(0.0, cosine(x[i], x[j])) for j in range(count)] for i in range(count)])
    best, picked, covered, gain, worth = [0.0] * count, [], [], {}, []
    for n in range(budget):
        if n % picks_per_step == 0:
            for j in range(count):
                gain[j] = sum(max(0.0, similar[i][j] - best[i]) for i in range(count))
                gain[j] *= scores[j] ** alpha if alpha else 1.0
        left = [j for j in range(count) if j not in picked]
        j = take(gain, left, picked, follow)
        worth.append(min([gain[j], *worth]))
        best = [max(best[i], similar[i][j]) for i in range(count)]
        covered.append(sum(best) / count)
        gain = {i: gain[i] * (1.0 - similar[i][j]) for i in gain}
    return keep_ranked(x, picked, worth, covered, coverage, merge, merge_from)


def divprune(x, budget, coverage, merge, merge_from, follow=None):
    count = len(x)
    apart = [[1.0 - cosine(x[i], x[j]) for j in range(count)] for i in range(count)]
    picked, covered, worth = [], [], []
    for n in range(budget):
        left = [j for j in range(count) if j not in picked]
        if n == 0:
            far = [min((apart[j][i] for i in left if i != j), default=0.0) for j in left]
        else:
            far = [min(apart[j][i] for i in picked) for j in range(count)]
        j = take(far, left, picked, follow)
        worth.append(min([far[j], *worth]) if n else 2.0)
        reached = [max(0.0, 1.0 - min(apart[j][i] for i in picked)) for j in range(count)]
        covered.append(sum(reached) / count)
    return keep_ranked(x, picked, worth, covered, coverage, merge, merge_from)


def keep_ranked(x, picked, worth, covered, coverage, merge, merge_from):
    enough = [n + 1 for n, share in enumerate(covered) if coverage < 1 and share >= coverage]
    kept = sorted(picked[: enough[0] if enough else len(picked)])
    answer = Answer(order=[picked.index(patch) for patch in kept])
    answer.worth = [max(0.0, worth[picked.index(patch)]) for patch in kept]
    members = {patch: [x[patch]] for patch in kept}
    if merge == "nearest":
        for patch in range(len(x)):
            if patch not in kept:
                nearest = max(kept, key=lambda k: cosine(x[patch], x[k]))
                if cosine(x[patch], x[nearest]) < merge_from:
                    continue
                members[nearest].append(x[patch])
                answer.assignment[patch] = -(kept.index(nearest) + 2)
    for slot, patch in enumerate(kept):
        answer.tokens.append(sum(members[patch]) / len(members[patch]))
        answer.origin.append(patch)
        answer.assignment[patch] = slot
    return answer
