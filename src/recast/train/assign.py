"""Linear assignment: the permutation of least cost, by shortest augmenting paths.

Rows are added one by one; each searches the cheapest alternating path to a free column under the
reduced costs cost - u - v, which stay >= 0 (Jonker & Volgenant 1987). O(n³), a millisecond for
batches that fit a GPU: not worth a dependency on scipy.
"""

import numpy as np


def assign(cost: np.ndarray) -> list[int]:
    """The column of each row of a square matrix (n, n) of finite costs, least in sum."""
    n = len(cost)
    u, v = np.zeros(n), np.zeros(n + 1)
    owner = np.full(n + 1, -1)  # row of each column; column n is where a search starts
    for row in range(n):
        owner[n] = row
        column = n
        shortest, before, done = np.full(n, np.inf), np.full(n, n), np.zeros(n + 1, dtype=bool)
        while owner[column] >= 0:
            done[column] = True
            here = owner[column]
            open_ = np.flatnonzero(~done[:n])
            reduced = cost[here, open_] - u[here] - v[open_]
            nearer = reduced < shortest[open_]
            shortest[open_[nearer]], before[open_[nearer]] = reduced[nearer], column
            step = shortest[open_].min()
            u[owner[done]] += step
            v[done] -= step
            shortest[open_] -= step
            column = int(open_[shortest[open_].argmin()])
        while column != n:
            owner[column] = owner[before[column]]
            column = int(before[column])
    columns = np.empty(n, dtype=int)
    columns[owner[:n]] = np.arange(n)
    return [int(c) for c in columns]
