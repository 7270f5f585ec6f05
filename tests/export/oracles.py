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


def prumerge(features, scores, keys, budget, plus=False):
    answer, x, key, count = Answer(), features[1:], keys[1:], len(scores)
    first, third = np.percentile(scores, 25), np.percentile(scores, 75)
    outliers = sum(1 for a in scores if a > third + 1.5 * (third - first))
    share = outliers / count
    kept = by_score(scores)[: int(count * share)]
    if plus:
        step = int(1 / (share if outliers else 1 / count)) // 3
        grid = [patch for patch in range(0, count - 1, max(1, step)) if patch not in kept]
        room = max(0, budget - 1 - len(kept))
        strongest = sorted(grid, key=lambda patch: (-scores[patch], patch))[:room]
        kept = kept + sorted(strongest)
    kept = kept[: budget - 1]

    for patch in kept:
        others = [other for other in range(count) if other != patch]
        others.sort(key=lambda other: (-cosine(key[patch], key[other]), other))
        answer.assignment[patch] = len(answer.tokens)
        answer.tokens.append(sum((scores[j] * x[j] for j in others[:32]), x[patch]))
        answer.origin.append(patch)
    pruned = [patch for patch in range(count) if patch not in kept]
    for patch in pruned:
        answer.assignment[patch] = -(len(kept) + 2)
    answer.tokens.append(sum(scores[j] * x[j] for j in pruned))
    answer.origin.append(-1)
    return answer


def uniform(features, budget):
    count, answer = len(features) - 1, Answer()
    for i in range(budget):
        patch = int(np.floor((i + 0.5) * count / budget))
        answer.assignment[patch] = i
        answer.tokens.append(features[1 + patch])
        answer.origin.append(patch)
    return answer


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
