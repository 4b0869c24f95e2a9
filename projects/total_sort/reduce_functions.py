"""Total order sort: the engine has sorted by the time that this is called, so there is nothing left to do."""


def as_they_are(group, auxiliary_data):
    return group
