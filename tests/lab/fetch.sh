#!/bin/bash
# Makes what every lab shares: the guests' root tree ($LAB_DIR/root), the User Mode Linux kernel
# ($LAB_DIR/uml, umlfp.so) and the test suites ($LAB_DIR/suites, seen as /suites by every guest).
#   fetch.sh           make what is missing; does nothing when all is there
#   fetch.sh suites    only the test suites (the one part that needs cargo, and no root)
# Debian's packages come with apt-get and are unpacked, not installed; apt checks their signatures.
# Needs root (ownership in the tree), apt-get, dpkg-deb, gcc, cargo. Two runs at once are safe.
# Some 145 packages, 100 MB; unpacked 430 MB. A minute on a machine with two cores.
set -euo pipefail
. "$(dirname "$0")/common.sh"

# Only what the tests call; every package costs time on a new machine.
PACKAGES="bash dash coreutils util-linux mount procps kmod iproute2 iputils-ping grep sed findutils
  diffutils mawk libc-bin perl-base attr acl hostname passwd e2fsprogs xfsprogs netbase nfs-common
  rpcbind libnfs-utils python3 strace tcpdump user-mode-linux"
# Pinned: an expected failure belongs to one version of a suite.
PJDFSTEST=0.2.2
FSX=0.3.2

case $LAB_DIR in
*[\ ,]*) die "LAB_DIR '$LAB_DIR' holds a space or comma, which the guests' kernel cannot read" ;;
esac

apt() { # with an empty list of installed packages, so that apt names all that a root tree needs
  apt-get -o Dir::State::status="$LAB_DIR/apt/status" -o Dir::Cache::archives="$LAB_DIR/debs" \
    -o APT::Sandbox::User=root --no-install-recommends -y -qq "$@"
}

packages_stamp() {
  { echo "$PACKAGES"; declare -f make_root; cat "$HERE/umlfp.c"; } | sha256sum | cut -c1-16
}
suites_stamp() { echo "pjdfstest $PJDFSTEST fsx $FSX"; }
guest_stamp() { cat "$HERE/common.sh" "$HERE"/guest/* | sha256sum | cut -c1-16; }
is_made() { [ "$(cat "$LAB_DIR/$1.made" 2>/dev/null)" = "$2" ]; }

download() {
  mkdir -p "$LAB_DIR/debs/partial"
  mkdir -p "$LAB_DIR/apt" && : >"$LAB_DIR/apt/status"
  # A 404 means that the package lists are older than the archive: renew them, try once more.
  apt --download-only install $PACKAGES >/dev/null 2>&1 || {
    apt-get -qq update || true
    apt --download-only install $PACKAGES >/dev/null
  }
}

make_root() {
  local root=$LAB_DIR/root.new deb d
  rm -rf "$root" "$LAB_DIR/uml.new"
  mkdir -p "$root"/usr/{bin,sbin,lib,lib64} "$LAB_DIR/uml.new"
  for d in bin sbin lib lib64; do ln -s "usr/$d" "$root/$d"; done
  for deb in "$LAB_DIR"/debs/*.deb; do
    case $deb in
      */user-mode-linux_*) dpkg-deb -x "$deb" "$LAB_DIR/uml.new" ;;
      *) dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink -C "$root" \
        --exclude='./usr/share/doc' --exclude='./usr/share/man' --exclude='./usr/share/locale' ;;
    esac
  done
  mkdir -p "$root"/{proc,sys,dev,run,tmp,mnt,host,share,suites,etc,root}
  mkdir -p "$root/var/lib/nfs" "$root/lib/modules"
  cp -a "$LAB_DIR"/uml.new/usr/lib/uml/modules/* "$root/lib/modules/"
  # What the packages' own install scripts would have done, as far as the guests need it.
  ln -sf dash "$root/bin/sh"
  ln -sf mawk "$root/usr/bin/awk"
  ln -sf which.debianutils "$root/usr/bin/which"
  ln -sf /proc/mounts "$root/etc/mtab"
  cat >"$root/etc/passwd" <<'P'
root:x:0:0:root:/root:/bin/bash
daemon:x:1:1::/tmp:/bin/sh
_rpc:x:102:65534::/run/rpcbind:/usr/sbin/nologin
statd:x:103:65534::/var/lib/nfs:/usr/sbin/nologin
u1:x:1001:1001::/tmp:/bin/sh
u2:x:1002:1002::/tmp:/bin/sh
u3:x:1003:1003::/tmp:/bin/sh
nobody:x:65534:65534:nobody:/:/usr/sbin/nologin
P
  printf '%s\n' root:x:0: daemon:x:1: u1:x:1001: u2:x:1002: u3:x:1003: team:x:2000:u1,u2 \
    nogroup:x:65534: >"$root/etc/group"
  printf '%s: files\n' passwd group hosts protocols services rpc >"$root/etc/nsswitch.conf"
  chroot "$root" ldconfig
  # The guests' root is read-only, so Python could never keep its compiled modules itself.
  chroot "$root" python3 -m compileall -q /usr/lib/python3.* >/dev/null || true
  gcc -O2 -Wall -shared -fPIC -o "$LAB_DIR/umlfp.so.new" "$HERE/umlfp.c"
  mv "$LAB_DIR/umlfp.so.new" "$LAB_DIR/umlfp.so"
  rm -rf "$LAB_DIR/root" "$LAB_DIR/uml"
  mv "$root" "$LAB_DIR/root"
  mv "$LAB_DIR/uml.new" "$LAB_DIR/uml"
}

install_guest_files() { # by rename: a running guest keeps the file that it has open
  local root=$LAB_DIR/root
  put() { install -m 755 "$1" "$2.new" && mv "$2.new" "$2"; }
  put "$HERE/guest/init" "$root/init"
  put "$HERE/guest/agent.py" "$root/usr/sbin/lab-agent"
  put "$HERE/guest/acklog.py" "$root/usr/sbin/lab-acklog"
  put "$HERE/guest/locktool.py" "$root/usr/sbin/lab-locktool"
  put "$HERE/guest/writer.py" "$root/usr/sbin/lab-writer"
  hosts_file >"$root/etc/hosts.new" && mv "$root/etc/hosts.new" "$root/etc/hosts"
}

make_suites() { # one target directory for both: they share most of their dependencies
  local build=$LAB_DIR/suites-build
  CARGO_TARGET_DIR=$build/target CARGO_PROFILE_RELEASE_OPT_LEVEL=1 cargo install -q --locked \
    --root "$build" --version "$PJDFSTEST" pjdfstest
  CARGO_TARGET_DIR=$build/target CARGO_PROFILE_RELEASE_OPT_LEVEL=1 cargo install -q --locked \
    --root "$build" --version "$FSX" fsx
  cp "$build"/bin/{pjdfstest,fsx} "$LAB_DIR/suites/"
  rm -rf "$build/target"
}

mkdir -p "$LAB_DIR/suites"
exec 9>"$LAB_DIR/fetch.lock"
flock 9
if ! is_made suites "$(suites_stamp)"; then
  make_suites
  suites_stamp >"$LAB_DIR/suites.made"
fi
case ${1:-} in
suites) exit 0 ;;
'') ;;
*) sed -n '2,8p' "$0"; exit 2 ;;
esac
if ! is_made root "$(packages_stamp)"; then
  [ "$(id -u)" = 0 ] || die "must be root to make $LAB_DIR/root"
  rm -f "$LAB_DIR"/{root,guest}.made
  rm -rf "$LAB_DIR/debs"
  download
  make_root
  rm -rf "$LAB_DIR/debs"
  packages_stamp >"$LAB_DIR/root.made"
fi
if ! is_made guest "$(guest_stamp)"; then
  install_guest_files
  guest_stamp >"$LAB_DIR/guest.made"
fi
