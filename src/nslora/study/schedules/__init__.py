"""When to tune weights and when to rewrite prompts: every schedule of an instance, tabulated.

A router of your own is scored in five lines, without a model:

    from nslora.study.schedules import load, route

    def mine(moves, needs, cfg):
        return "S" if not moves or needs.style > 0.5 else "N"

    print(route(mine, load("results/schedules"))[["instance", "schedule", "test", "regret"]])

| module     | what                                                                              |
| ---------- | --------------------------------------------------------------------------------- |
| trees      | the data set; where a router ends, what it returns, costs, and loses               |
| routers    | routers to compare with: fixed, tuned, learned, looking ahead, knowing the outcome |
| answers    | value of adaptivity, regret, test of the signal, the map of first moves            |
| playground | a tree and the path that thresholds choose in it, with sliders                     |
"""

from nslora.study.schedules.trees import Trees, load, route

__all__ = ["Trees", "load", "route"]
