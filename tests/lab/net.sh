#!/bin/bash
# One lab's network and server hosts. Everything lives in namespaces made here; nothing reaches
# the machine's own network.
#   net.sh up | down | list   down ends every process of this lab, virtual machines included
#   net.sh exec HOST CMD...   run CMD as server host HOST (s1, s2, s3)
#   net.sh float HOST|none    move the service address (with gratuitous ARP)
#   net.sh crash HOST         power loss: its network goes, then all its processes
#   net.sh boot HOST          start a crashed host afresh (its /var/lib/nfs is kept)
#   net.sh cut|heal NAME      break the cable of s1.. or c1.. somewhere on its way, mend it; s1p.. is
#                             the cable to the other hosts
#   net.sh unplug|plug HOST   pull the cable of s1.. or s1p.. out, which the host sees; put it back
#   net.sh capture FILE       tcpdump on the bridge of the data segment (foreground)
#   net.sh sweep RUNS         take down labs under RUNS whose test is gone
set -euo pipefail
. "$(dirname "$0")/common.sh"
SW=$LAB_NS-sw
hostdir() { echo "$LAB_RUN/hosts/$1"; }
ns() { echo "$LAB_NS-$1"; }
pid_of() { cat "$(hostdir "$1")/pid"; }

cable() { # a host's cards: eth0 to the clients, eth1 to the other hosts; its frames tell it by MAC
  local h=$1 n=${1#s}
  ip netns add "$(ns "$h")"
  ip -n "$SW" -batch - <<B
link add $h type veth peer name eth0 address 52:54:00:77:02:0$n netns $(ns "$h")
link add ${h}p type veth peer name eth1 address 52:54:00:79:02:0$n netns $(ns "$h")
link set $h master br0 up
link set ${h}p master brp up
B
  ip -n "$(ns "$h")" -batch - <<B
link set lo up
link set eth0 up
link set eth1 up
addr add $NET.$n/24 dev eth0
addr add $NET6:$n/64 dev eth0 nodad
addr add $PEER_NET.$n/24 dev eth1
B
}

boot() { # a host is a net, mount, uts and pid namespace; its process 1 only reaps
  local h=$1 d i u child
  d=$(hostdir "$h")
  mkdir -p "$d"/nfs/{sm,sm.bak}
  hosts_file >"$d/hosts"
  echo "$h" >"$d/hostname"
  cable "$h"
  # /run and /srv are this host's own: no rpcbind socket of the machine is seen, and what a test
  # exports from /srv is gone with the host. fd 9 of the caller must not live on in here.
  nsenter --net="/run/netns/$(ns "$h")" setsid unshare -m -u -p -f --mount-proc --propagation private \
    bash -c 'set -e; hostname "$1"; d=$2
      mkdir -p /var/lib/nfs
      mount --bind "$d/nfs" /var/lib/nfs
      mount --bind "$d/hosts" /etc/hosts
      mount --bind "$d/hostname" /etc/hostname
      mount -t tmpfs tmpfs /srv
      mount -t tmpfs tmpfs /run
      mkdir -p /run/rpcbind /run/lock
      : >/run/.lab
      exec /usr/bin/python3 -c "
import signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True: signal.pause()"' boot "$h" "$d" </dev/null >"$d/boot.log" 2>&1 9>&- &
  u=$!
  for ((i = 0; i < 200; i++)); do
    child=$(cat "/proc/$u/task/$u/children" 2>/dev/null | tr -d ' ') || true
    if [ -n "$child" ] && [ -e "/proc/$child/root/run/.lab" ]; then
      echo "$child" >"$d/pid"
      return
    fi
    sleep 0.05
  done
  cat "$d/boot.log" >&2
  die "host $h did not start"
}

enter() { local h=$1; shift; exec nsenter -t "$(pid_of "$h")" -m -u -p -n -- "$@"; }

crash() { # nothing of its network outlives it: a connection of its last life would speak again
  ip -n "$SW" -batch - <<B
link del $1
link del ${1}p
B
  kill -9 "$(pid_of "$1")"
  rm -f "$(hostdir "$1")/pid"
  ip netns del "$(ns "$1")"
}

garp() { # gratuitous ARP for address $2 from host $1
  nsenter --net="/run/netns/$(ns "$1")" /usr/bin/python3 - "$2" <<'P'
import socket, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806))
s.bind(('eth0', 0))
mac, ip = s.getsockname()[4], socket.inet_aton(sys.argv[1])
body = b'\x00\x01\x08\x00\x06\x04\x00%c' + mac + ip + b'\xff' * 6 + ip
for op in (1, 2, 1):
    s.send(b'\xff' * 6 + mac + b'\x08\x06' + body % op)
P
}

float() {
  local i
  for i in $SERVERS; do
    [ "s$i" = "$1" ] || ip -n "$(ns "s$i")" addr del "$FLOAT/24" dev eth0 2>/dev/null || true
  done
  [ "$1" = none ] && return
  ip -n "$(ns "$1")" addr replace "$FLOAT/24" dev eth0
  garp "$1" "$FLOAT"
}

up() {
  local i b t
  mkdir -p "$LAB_RUN"/{vms,hosts,share}
  ip netns add "$SW"
  for b in br0 brp brm; do
    echo "link add $b type bridge forward_delay 0 stp_state 0 mcast_snooping 0"
    echo "link set $b up"
  done | ip -n "$SW" -batch -
  ip -n "$SW" addr add "$MGMT.1/24" dev brm
  ip -n "$SW" link set lo up
  for i in $CLIENTS; do
    for t in "c$i:br0" "c${i}m:brm"; do
      ip -n "$SW" tuntap add dev "${t%:*}" mode tap
      ip -n "$SW" link set "${t%:*}" master "${t#*:}" up
    done
  done
  for i in $SERVERS; do
    boot "s$i"
  done
}

namespaces() { ip netns list | awk -v p="$LAB_NS-" 'index($1, p) == 1 { print $1 }'; }

processes() { # every process in one of this lab's namespaces, whatever started it
  local n
  for n in $(namespaces); do ip netns pids "$n"; done
}

down() { # virtual machines hold taps in the switch's namespace, so they go with it
  local i p n
  for ((i = 0; i < 100; i++)); do
    p=$(processes)
    [ -n "$p" ] || break
    kill -9 $p 2>/dev/null || true
    sleep 0.05
  done
  for n in $(namespaces); do ip netns del "$n"; done
}

sweep() { # a test keeps RUNS/NAME/owner locked while it lives; NAME is the namespaces' prefix too
  local d
  for d in "$1"/*/; do
    [ -e "$d/owner" ] || continue
    (
      exec 8<"$d/owner"
      flock -n 8 || exit 0
      LAB_NS=$(basename "$d") LAB_RUN=$d "$HERE/net.sh" down 8<&- && rm -rf "$d"
    )
  done
}

case ${1:-} in
up) up ;;
down) down ;;
list)
  for i in $SERVERS; do
    echo "s$i pid $(pid_of "s$i" 2>/dev/null || echo -): $(ip -n "$(ns "s$i")" -br addr show dev eth0 2>/dev/null || true)"
  done
  ip -n "$SW" -br link ;;
exec) shift; enter "$@" ;;
float) float "$2" ;;
crash) crash "$2" ;;
boot) boot "$2" ;;
# Off the bridge, but up: a guest's network card does not outlive write errors on its tap.
cut) ip -n "$SW" link set "$2" nomaster ;;
heal)
  case $2 in s*p) b=brp ;; *) b=br0 ;; esac
  ip -n "$SW" link set "$2" master $b ;;
unplug) ip -n "$SW" link set "$2" down ;;
plug) ip -n "$SW" link set "$2" up ;;
capture) exec nsenter --net="/run/netns/$SW" "$LAB_DIR/root/usr/bin/tcpdump" -Z root -s 512 -U --immediate-mode -i br0 -w "$2" ;;
sweep) sweep "$2" ;;
*) sed -n '2,14p' "$0"; exit 2 ;;
esac
