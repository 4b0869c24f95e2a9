#!/bin/sh
# Runs one playbook for make:  scripts/play.sh VERB
#
# INVENTORY names a folder of inventory/ or any path. NODE, DATA, PURGE, CONFIRM, PROJECT and CA become the variables mrcore_node
# and so on; ARGS is passed as it is. The same by hand:  .venv/bin/ansible-playbook -i inventory/prod ansible/VERB.yml
set -eu
cd "$(dirname "$0")/.."
verb=$1

say() { echo "$verb: $*" >&2; }

if [ -z "${INVENTORY:-}" ]; then
    say "say which cluster: make $verb INVENTORY=prod (a folder of inventory/; inventory/sample is there to be copied)"
    exit 2
fi
case $INVENTORY in
*/* | .*) inventory=$INVENTORY ;;
*) inventory=inventory/$INVENTORY ;;
esac
if [ ! -e "$inventory" ]; then
    say "there is no $inventory. Make one, then do this again:"
    echo "    cp -r inventory/sample $inventory" >&2
    echo "    edit $inventory/hosts.yml (names and addresses of the machines) and $inventory/group_vars/all.yml (ansible_user)" >&2
    exit 2
fi
export LC_ALL="${LC_ALL:-C.UTF-8}" # Ansible refuses to start without UTF-8

set --
for each in NODE DATA PURGE CONFIRM PROJECT CA; do
    eval "value=\${$each:-}"
    name=mrcore_$(echo "$each" | tr '[:upper:]' '[:lower:]')
    if [ -n "$value" ]; then set -- "$@" --extra-vars "$name='$value'"; fi
done
# shellcheck disable=SC2086  # ARGS is a list of words
exec .venv/bin/ansible-playbook -i "$inventory" "ansible/$(echo "$verb" | tr - _).yml" "$@" ${ARGS:-}
