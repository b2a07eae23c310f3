"""Whose turn it is: deficit round robin, so that no tenant takes what others wait for."""

from collections.abc import Mapping, Sequence


class DeficitRoundRobin:
    """Shares a budget among tenants whose items cost different amounts.

    Each visit gives a tenant `quantum` of credit, and it takes items while its credit lasts; what
    is left stays with it for as long as it waits. Over time tenants that always wait are served
    equal amounts, however many items each of them brings and whatever these cost.
    Source: Shreedhar and Varghese, Efficient Fair Queuing using Deficit Round Robin, 1995.
    """

    def __init__(self, *, quantum: int) -> None:
        self._quantum = quantum
        # In the order of their turns; a tenant leaves when it waits for nothing.
        self._credit: dict[str, int] = {}

    def pick(self, costs: Mapping[str, Sequence[int]], *, budget: int) -> list[str]:
        """Choose items within the budget.

        Args:
            costs: for each tenant what its waiting items cost, in their order.
            budget: most that is given out now.

        Returns:
            The tenant of each chosen item; a tenant that stands there twice has its first two.
        """
        credit = {name: left for name, left in self._credit.items() if costs.get(name)}
        for name, items in costs.items():
            if items:
                credit.setdefault(name, 0)
        self._credit = credit
        taken = dict.fromkeys(credit, 0)
        chosen: list[str] = []
        while any(taken[name] < len(costs[name]) for name in credit):
            name = next(iter(credit))
            left = credit.pop(name)
            if taken[name] == len(costs[name]):
                # It waits for nothing more in this round: credit is not saved up.
                credit[name] = 0
                continue
            left += self._quantum
            while taken[name] < len(costs[name]) and costs[name][taken[name]] <= left:
                cost = costs[name][taken[name]]
                if cost > budget:
                    self._credit = {name: left - self._quantum, **credit}
                    return chosen
                left -= cost
                budget -= cost
                taken[name] += 1
                chosen.append(name)
            credit[name] = left
        return chosen
