"""Stub."""


def class_list(value):
    return value


def explicit_order(names, path):
    return names, list(range(len(names)))
