def add_up(group, auxiliary_data):
    return [(group[0][0], sum(value for _, value in group))]


def shares_of_section(group, auxiliary_data):
    visits = sum(value[0] for _, value in group)
    popular = sorted(value[1] for _, value in group if value[1])
    share = round(visits / auxiliary_data["visits"], 4)
    return [(group[0][0], {"visits": visits, "share": share, "popular": popular})]
