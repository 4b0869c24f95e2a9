"""PySpark: RDDs and pure Python functions in one local session of two cores, warmed up before anything is measured."""

from __future__ import annotations

import json
import os
import sys
from operator import add
from pathlib import Path
from typing import Any

os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"

import pyspark
from pyspark import SparkConf, SparkContext

PARTITIONS = 4  # two for each core


def to_json(item: Any) -> str:
    return json.dumps(item, ensure_ascii=False, separators=(",", ":"))


def key_and_rest(line: str) -> tuple[str, str]:
    key, _, rest = line.partition("\t")
    return key, rest


def customer(line: str) -> tuple[int, str]:
    number, name = line.split("\t")
    return int(number), name


def order(line: str) -> tuple[int, tuple[str, str]]:
    number, identifier, amount = line.split("\t")
    return int(number), (identifier, amount)


def joined(item: tuple[int, tuple[str, tuple[str, str]]]) -> str:
    number, (name, columns) = item
    return to_json((number, (name, *columns)))


class Competitor:
    """One SparkContext."""

    how = (
        f"local[2], RDD: flatMap, groupByKey().mapValues(sum) or (combiner) reduceByKey; sortByKey; join; {PARTITIONS} "
        "partitions, 6 GB for the JVM, 2 GB before a Python worker spills; session warm"
    )
    separator = None

    def __init__(self, name: str, folder: Path) -> None:
        scratch = folder / "spark-local"
        scratch.mkdir(parents=True, exist_ok=True)
        settings = {
            "spark.ui.enabled": "false",
            "spark.driver.memory": "6g",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
            "spark.local.dir": str(scratch),
            "spark.python.worker.memory": "2g",
            "spark.log.level": "ERROR",
        }
        conf = SparkConf().setMaster("local[2]").setAppName("bench").setAll(list(settings.items()))
        self._context = SparkContext(conf=conf)
        self._context.addPyFile(__file__)  # the workers import the functions above from it
        self.versions = {"pyspark": pyspark.__version__}
        for _ in range(2):  # starts the Python workers and warms the JVM
            self._context.parallelize(range(200_000), PARTITIONS).map(lambda n: (n % 100, 1)).reduceByKey(add).collect()

    def run(self, work: str, inputs: list[Path], out: Path) -> None:
        read = self._context.textFile
        if work == "sort":
            result = read(",".join(map(str, inputs))).map(key_and_rest).sortByKey(numPartitions=PARTITIONS).map(to_json)
        elif work == "join":
            names = read(",".join(str(path) for path in inputs if path.name.startswith("customers"))).map(customer)
            orders = read(",".join(str(path) for path in inputs if path.name.startswith("orders"))).map(order)
            result = names.join(orders, PARTITIONS).map(joined)
        else:
            ones = read(",".join(map(str, inputs))).flatMap(str.split).map(lambda word: (word, 1))
            if work == "wordcount":
                result = ones.groupByKey(PARTITIONS).mapValues(sum).map(to_json)
            else:
                result = ones.reduceByKey(add, PARTITIONS).map(to_json)
        result.saveAsTextFile(str(out))

    def output(self, work: str, out: Path) -> list[Path]:
        return sorted(out.glob("part-*"))

    def close(self) -> None:
        self._context.stop()
