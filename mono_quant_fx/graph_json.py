def graph_to_json(gm):
    raise NotImplementedError


def graph_from_json(d, t):
    raise NotImplementedError
