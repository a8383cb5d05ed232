# Settings and helpers that the lab's scripts share; sourced, never run.
#
# Two directories are kept apart: LAB_DIR holds what is made once and only read afterwards (guest
# root, kernel, test suites), LAB_RUN what belongs to one running lab (virtual machines, hosts).
# Labs beside each other share the first and differ in LAB_RUN and LAB_NS; since every lab has its
# own bridge in its own namespace, all of them use the same addresses.
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
LAB_DIR=${LAB_DIR:-$(realpath -m "$HERE/../../target/lab")}
LAB_RUN=${LAB_RUN:-$LAB_DIR/run}
LAB_NS=${LAB_NS:-havenfs}                # prefix of every network namespace of this lab
NET=10.77.0                              # data segment (bridge br0)
NET6=fd77:                               # the same in IPv6
PEER_NET=10.79.0                         # what the hosts say among each other (bridge brp)
MGMT=10.78.0                             # vmctl's own segment (bridge brm)
SERVERS="1 2 3"                          # hosts s1..s3 at $NET.1..3 and $NET6:1..3
CLIENTS="1 2 3 4"                        # virtual machines c1..c4 at $NET.11..14, $NET6:11..14
FLOAT=$NET.100                           # the floating service address
FLOAT_NAME=nfs-service
export LAB_DIR LAB_RUN LAB_NS

die() { echo "$(basename "$0"): $*" >&2; exit 1; }

# The /etc/hosts of every server host and virtual machine.
hosts_file() {
  local i
  echo "127.0.0.1 localhost"
  echo "$FLOAT $FLOAT_NAME"
  echo "$NET6:100 ${FLOAT_NAME}6"
  echo "$NET.101 ${FLOAT_NAME}2"
  for i in $SERVERS; do echo "$NET.$i s$i"; done
  for i in $CLIENTS; do echo "$NET.$((10 + i)) c$i"; done
}
