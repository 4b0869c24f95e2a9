"""Names what on this machine may keep members of the cluster from its ports: other firewalls, tables that drop."""

import json
import os
import subprocess


def output(*command):
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 1, ""
    return done.returncode, done.stdout.decode(errors="replace")


found = []
os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
os.environ["LC_ALL"] = "C"
if "Status: active" in output("ufw", "status")[1]:
    found.append("ufw is active (ufw allow from MEMBER to any port PORT proto tcp)")
if output("firewall-cmd", "--state")[0] == 0:
    found.append("firewalld is active (firewall-cmd --add-rich-rule)")
try:
    rules = json.loads(output("nft", "--json", "list", "ruleset")[1] or "{}").get("nftables", [])
except ValueError:
    rules = []
chains = {}
for entry in rules:
    if "chain" in entry and entry["chain"].get("hook") == "input":
        chain = entry["chain"]
        chains[chain["family"], chain["table"], chain["name"]] = chain.get("policy") == "drop"
for entry in rules:
    rule = entry.get("rule", {})
    key = rule.get("family"), rule.get("table"), rule.get("chain")
    if key in chains and any(set(step) & {"drop", "reject"} for step in rule.get("expr", []) if isinstance(step, dict)):
        chains[key] = True
for (family, table, chain), drops in sorted(chains.items()):
    if drops and (family, table) != ("inet", "mrcore"):
        found.append(f"chain {chain} of table {family} {table} drops packets (nft list table {family} {table})")
print("; ".join(found))
