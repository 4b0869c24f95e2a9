"""Visits of pages, `TIME USER PAGE` a line, and the pages' sections."""

import json


def visits_of_line(line, auxiliary_data):
    fields = line.split()
    if len(fields) == 3:
        yield fields[2], 1


def section_of_page(line, auxiliary_data):
    page, visits = json.loads(line)  # an item that page_visits has put out
    yield page.split("/")[1], [visits, page if page in auxiliary_data["popular"] else None]
