// SPDX-License-Identifier: Apache-2.0
//
// A virtual machine with another kernel and this machine's own files: qemu in software emulation (nothing that is timed
// inside means anything), `/` shared read-only by virtiofs below an overlay of tmpfs, so that the checkout, Node and
// every tool are there as they are here, and what is written is gone afterwards. No network but loopback.

import { existsSync, globSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { must, type Running, Testbed, until } from '../netns.ts';
import type { Kernel } from './debian.ts';

const VIRTIOFSD = ['/usr/lib/qemu/virtiofsd', '/usr/libexec/virtiofsd'].find((path) => existsSync(path));
const QEMU = '/usr/bin/qemu-system-x86_64';
const MEMORY = '2048M';
/** What it takes to see the root file system; whatever else is needed the kernel asks modprobe for. */
const MODULES = ['virtio_pci', 'virtio_console', 'virtiofs', 'overlay'];
/**
 * Waits inside are this many times as long (AMBIENT_REDIRECT_PATIENCE). A clock that counts instructions goes on to the
 * next timer as soon as there is nothing to compute, as while a file is read from a busy machine: no wait takes long there.
 */
const PATIENCE = 8;
const PATIENCE_COUNTING = 10_000;

export interface Ended {
  /** Exit code of the command; null: the machine ended before it did. */
  status: number | null;
  /** stdout and stderr of the command. */
  output: string;
  /** What the command left in the file $REPORT. */
  report: string;
  /** What the kernel said. */
  console: string;
}

/** What is missing on this machine to boot another kernel, or undefined. */
export function cannotBoot(): string | undefined {
  const missing = [QEMU, '/usr/bin/cpio', '/usr/sbin/modprobe', '/bin/busybox'].filter((path) => !existsSync(path));
  if (VIRTIOFSD === undefined) missing.push('virtiofsd');
  return missing.length > 0 ? `${missing.join(', ')} not installed` : undefined;
}

/**
 * Boots `kernel`, runs `command` (a line for sh, in directory `root`), and turns the machine off. `limit` in ms.
 * `countInstructions`: its clock goes on by 1 ns for each instruction, and by nothing else while it computes.
 */
export async function boot(
  kernel: Kernel,
  root: string,
  command: string,
  limit: number,
  { countInstructions = false } = {},
): Promise<Ended> {
  using testbed = Testbed.open();
  const work = testbed.directory('kernel');
  const file = (name: string) => join(work, name);
  writeFileSync(file('guest.sh'), guestScript(kernel, root, command, countInstructions ? PATIENCE_COUNTING : PATIENCE));
  makeInitramfs(kernel, work);

  const socket = file('fs.sock');
  const options = ['source=/', 'sandbox=chroot', 'cache=always'].flatMap((option) => ['-o', option]);
  const shared = testbed.start([VIRTIOFSD ?? '', `--socket-path=${socket}`, ...options]);
  await until(
    'virtiofsd listens',
    () => {
      if (!shared.alive) throw new Error(`virtiofsd ended: ${shared.output}`);
      return existsSync(socket);
    },
    30_000,
  );
  const machine = testbed.start([
    QEMU,
    ...['-M', 'q35', '-cpu', 'max,la57=off', '-m', MEMORY],
    ...(countInstructions
      ? ['-accel', 'tcg,thread=single', '-icount', 'shift=0,sleep=off', '-smp', '1']
      : ['-accel', 'tcg,thread=multi', '-smp', '2']),
    ...['-display', 'none', '-no-reboot', '-nic', 'none', '-serial', `file:${file('console')}`],
    ...['-object', `memory-backend-memfd,id=memory,size=${MEMORY},share=on`, '-numa', 'node,memdev=memory'],
    ...['-chardev', `socket,id=fs,path=${socket}`, '-device', 'vhost-user-fs-pci,chardev=fs,tag=root'],
    ...['-device', 'virtio-serial-pci'],
    ...['output', 'status', 'report'].flatMap((name) => [
      ...['-chardev', `file,id=${name},path=${file(name)}`],
      ...['-device', `virtserialport,chardev=${name},name=${name}`],
    ]),
    ...['-kernel', kernel.image, '-initrd', file('initramfs'), '-append'],
    // no_timer_check: the check panics where the emulated timer is late, on a busy machine.
    'console=ttyS0 quiet no_timer_check mitigations=off nokaslr audit=0 random.trust_cpu=on tsc=reliable rcupdate.rcu_expedited=1 ' +
      `panic=-1 guest=${file('guest.sh')}`,
  ]);
  await ended(machine, limit);
  await shared.stop('SIGKILL');
  const read = (name: string) => (existsSync(file(name)) ? readFileSync(file(name), 'utf8') : '');
  const status = read('status').trim();
  return {
    status: status === '' ? null : Number(status),
    output: read('output'),
    report: read('report'),
    console: `${read('console')}${machine.output}`,
  };
}

/** Its end, or that of its time. */
async function ended(machine: Running, limit: number): Promise<void> {
  const timer = setTimeout(() => machine.kill('SIGKILL'), limit);
  await machine.ended;
  clearTimeout(timer);
}

function makeInitramfs(kernel: Kernel, work: string): void {
  const tree = join(work, 'initramfs.d');
  for (const directory of ['bin', 'modules']) mkdirSync(join(tree, directory), { recursive: true });
  must(['cp', '/bin/busybox', join(tree, 'bin/busybox')]);
  const order: string[] = [];
  for (const module of MODULES) {
    const needed = dependencies(kernel, module);
    // "builtin NAME" where the kernel has it inside.
    for (const [, path = ''] of needed.matchAll(/^insmod (\S+)/gm)) {
      const name = basename(path).replace(/\.ko.*$/, '.ko');
      if (order.includes(name)) continue;
      order.push(name);
      // busybox's insmod takes no compressed ones.
      must([
        'sh',
        '-c',
        path.endsWith('.xz') ? 'xz -dc "$0" >"$1"' : 'cat "$0" >"$1"',
        path,
        join(tree, 'modules', name),
      ]);
    }
  }
  writeFileSync(join(tree, 'modules/order'), `${order.join('\n')}\n`);
  writeFileSync(join(tree, 'init'), INIT, { mode: 0o755 });
  must(['sh', '-c', 'cd "$0" && find . | cpio -o -H newc --quiet >"$1"', tree, join(work, 'initramfs')]);
}

/** Lines of modprobe --show-depends. */
function dependencies(kernel: Kernel, module: string): string {
  const modules = join(kernel.root, 'lib/modules', kernel.release);
  const files = globSync(`kernel/**/${module}.ko*`, { cwd: modules });
  // From 7.0 on the packages have no list of what is built in: what has no file is.
  if (files.length === 0 && !existsSync(join(modules, 'modules.builtin'))) return '';
  return must(['modprobe', '-d', kernel.root, '-S', kernel.release, '--show-depends', module]);
}

// switch_root is called by the first process itself: the kernel's own threads share its root directory, and so find
// /sbin/modprobe in the new one.
const INIT = `#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /lower /upper /new
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
mount -t virtiofs -o ro root /lower
mount -t tmpfs -o size=75% tmpfs /upper
mkdir /upper/upper /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/upper,workdir=/upper/work overlay /new
for directory in /proc /sys /dev; do mount --move $directory /new$directory; done
mount -t tmpfs -o mode=755 tmpfs /new/run
for argument in $(cat /new/proc/cmdline); do
  case $argument in guest=*) cp "/new\${argument#*=}" /new/run/guest.sh ;; esac
done
exec switch_root /new /bin/sh /run/guest.sh
`;

function guestScript(kernel: Kernel, root: string, command: string, patience: number): string {
  return `# The first process of the machine, in its real root.
port() {
  for port in /sys/class/virtio-ports/*; do
    [ "$(cat "$port/name")" != "$1" ] || echo "/dev/\${port##*/}"
  done
}
exec </dev/null >"$(port output)" 2>&1
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /dev/pts /dev/shm /run/tmp /usr/lib/modules
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount --bind ${quoted(join(kernel.root, 'lib/modules'))} /usr/lib/modules
ip link set lo up
export PATH=${quoted(join(root, 'node_modules/.bin'))}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root TMPDIR=/run/tmp REPORT=/run/report AMBIENT_REDIRECT_PATIENCE=${patience}
cd ${quoted(root)}
(
${command}
)
echo $? >"$(port status)"
[ ! -e $REPORT ] || cat $REPORT >"$(port report)"
busybox poweroff -f
`;
}

function quoted(text: string): string {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}
