"""The cheapest way to part a network in two: a minimum cut by Dinic's method. Pure."""

import collections

UNBOUNDED = 1 << 62
"""The capacity of an edge that must not be cut."""


class Network:
    """A directed network with a source and a sink; `cheapest_side` parts it.

    Capacities are whole numbers, so that the result is exact; `UNBOUNDED` forbids a cut.
    """

    SOURCE = 0
    SINK = 1

    def __init__(self) -> None:
        self._edges: list[list[int]] = [[], []]
        self._heads: list[int] = []
        self._room: list[int] = []

    def add_vertex(self) -> int:
        """Add a vertex and return its number."""
        self._edges.append([])
        return len(self._edges) - 1

    def add_edge(self, tail: int, head: int, capacity: int) -> None:
        """Add an edge that costs ``capacity`` if ``tail`` ends on the source's side and ``head`` on the sink's."""
        for start, end, room in ((tail, head, capacity), (head, tail, 0)):  # the second is the way back of the first
            self._edges[start].append(len(self._heads))
            self._heads.append(end)
            self._room.append(room)

    def cheapest_side(self) -> list[bool]:
        """Return for each vertex whether it is on the source's side of a cheapest cut; the largest such side."""
        while True:
            level = self._levels()
            if level[self.SINK] < 0:
                break
            self._block(level)
        reaches_sink = [False] * len(self._edges)
        reaches_sink[self.SINK] = True
        todo = [self.SINK]
        while todo:
            vertex = todo.pop()
            for edge in self._edges[vertex]:
                before = self._heads[edge]
                if self._room[edge ^ 1] and not reaches_sink[before]:
                    reaches_sink[before] = True
                    todo.append(before)
        return [not reaches for reaches in reaches_sink]

    def _levels(self) -> list[int]:
        level = [-1] * len(self._edges)
        level[self.SOURCE] = 0
        todo = collections.deque([self.SOURCE])
        while todo:
            vertex = todo.popleft()
            for edge in self._edges[vertex]:
                head = self._heads[edge]
                if self._room[edge] and level[head] < 0:
                    level[head] = level[vertex] + 1
                    todo.append(head)
        return level

    def _block(self, level: list[int]) -> None:
        """Send flow along shortest paths until none is left: depth first, without recursion."""
        edges, heads, room = self._edges, self._heads, self._room
        untried = [0] * len(edges)
        path: list[int] = []
        vertex = self.SOURCE
        while True:
            if vertex == self.SINK:
                flow = min([room[edge] for edge in path])
                for edge in path:
                    room[edge] -= flow
                    room[edge ^ 1] += flow
                full = next(i for i, edge in enumerate(path) if not room[edge])
                vertex = heads[path[full] ^ 1]
                del path[full:]
                continue
            choices = edges[vertex]
            while untried[vertex] < len(choices):
                edge = choices[untried[vertex]]
                if room[edge] and level[heads[edge]] == level[vertex] + 1:
                    break
                untried[vertex] += 1
            else:
                if not path:
                    return
                level[vertex] = -1  # a dead end
                vertex = heads[path.pop() ^ 1]
                continue
            path.append(edge)
            vertex = heads[edge]
