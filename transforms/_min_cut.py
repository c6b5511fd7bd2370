"""The cheapest way to part a network in two: a minimum cut by Dinic's method. Pure."""

UNBOUNDED = 1 << 62
"""The capacity of an edge that must not be cut."""


class Network:
    """A directed network with a source and a sink; `cheapest_side` parts it.

    Capacities are whole numbers, so that the result is exact; `UNBOUNDED` forbids a cut.
    """

    SOURCE = 0
    SINK = 1

    def __init__(self) -> None:
        self._edges: list[list[tuple[int, int]]] = [[], []]  # of each vertex: number of the edge, and where it leads
        self._room: list[int] = []

    def add_vertex(self) -> int:
        """Add a vertex and return its number."""
        self._edges.append([])
        return len(self._edges) - 1

    def add_edge(self, tail: int, head: int, capacity: int) -> None:
        """Add an edge that costs ``capacity`` if ``tail`` ends on the source's side and ``head`` on the sink's."""
        room = self._room
        self._edges[tail].append((len(room), head))
        self._edges[head].append((len(room) + 1, tail))  # the way back of the first
        room += (capacity, 0)

    def cheapest_side(self) -> list[bool]:
        """Return for each vertex whether it is on the source's side of a cheapest cut; the largest such side."""
        while True:
            level = self._levels()
            if level[self.SOURCE] < 0:
                return [distance < 0 for distance in level]  # they do not reach the sink
            self._block(level)

    def _levels(self) -> list[int]:
        """Return each vertex's distance to the sink, of those farther than the source -1, if that reaches it."""
        edges, room = self._edges, self._room
        level = [-1] * len(edges)
        level[self.SINK] = distance = 0
        front = [self.SINK]
        while front and level[self.SOURCE] < 0:
            distance += 1
            found = []
            for vertex in front:
                for edge, before in edges[vertex]:
                    if level[before] < 0 and room[edge ^ 1]:
                        level[before] = distance
                        found.append(before)
            front = found
        return level

    def _block(self, level: list[int]) -> None:
        """Send flow along shortest paths until none is left: depth first, without recursion."""
        edges, room, sink = self._edges, self._room, self.SINK
        untried = [0] * len(edges)
        path: list[int] = []
        tails: list[int] = []
        vertex = self.SOURCE
        while True:
            if vertex == sink:
                flow = min([room[edge] for edge in path])
                full = -1
                for place, edge in enumerate(path):
                    room[edge] -= flow
                    room[edge ^ 1] += flow
                    if full < 0 and not room[edge]:
                        full = place
                vertex = tails[full]
                del path[full:], tails[full:]
                continue
            below = level[vertex] - 1
            choices = edges[vertex]
            for place in range(untried[vertex], len(choices)):
                edge, head = choices[place]
                if level[head] == below and room[edge]:
                    untried[vertex] = place
                    path.append(edge)
                    tails.append(vertex)
                    vertex = head
                    break
            else:
                if not path:
                    return
                level[vertex] = -2  # a dead end
                path.pop()
                vertex = tails.pop()
