// SPDX-License-Identifier: Apache-2.0
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';

/** The one image of these tests: sandbox (its default command only sleeps) and workload alike. */
export const busyboxImage = 'cri.local/busybox:1';

/** Answers with a JSON object: the peer address that the server's socket has, and the server's own host name. */
const whoami = `#!/bin/sh
echo 'Content-Type: application/json'
echo
echo "{\\"client\\": \\"$REMOTE_ADDR\\", \\"server\\": \\"$(hostname)\\"}"
`;

type Entry = { name: string; content?: Buffer | string; mode?: number; linkTo?: string; directory?: true };

/** A tar archive in the ustar format (POSIX.1-1988): names up to 100 bytes, owner root, no times. */
export function tar(entries: readonly Entry[]): Buffer {
  const blocks: Buffer[] = [];
  for (const { name, content = '', mode = 0o644, linkTo, directory } of entries) {
    const body = Buffer.from(content);
    const header = Buffer.alloc(512);
    const octal = (value: number, at: number, length: number) =>
      header.write(value.toString(8).padStart(length - 1, '0'), at, 'latin1');
    if (Buffer.byteLength(name) > 100) throw new Error(`tar entry ${name}: its name is longer than 100 bytes`);
    header.write(name, 0);
    octal(mode, 100, 8);
    octal(0, 108, 8);
    octal(0, 116, 8);
    octal(body.length, 124, 12);
    octal(0, 136, 12);
    header.write(directory ? '5' : linkTo ? '2' : '0', 156);
    header.write(linkTo ?? '', 157);
    header.write('ustar\0' + '00', 257, 'latin1');
    // The checksum is taken over the header with its own field filled with spaces.
    header.fill(' ', 148, 156);
    header.write(
      `${header
        .reduce((sum, byte) => sum + byte, 0)
        .toString(8)
        .padStart(6, '0')}\0 `,
      148,
      'latin1',
    );
    blocks.push(header, body, Buffer.alloc((512 - (body.length % 512)) % 512));
  }
  blocks.push(Buffer.alloc(1024));
  return Buffer.concat(blocks);
}

/** `busyboxImage` as `ctr images import` and `docker load` take it: an archive of a manifest, a configuration and a layer. */
export function busyboxArchive(): Buffer {
  const layer = tar([
    { name: 'bin/', mode: 0o755, directory: true },
    { name: 'bin/busybox', mode: 0o755, content: readFileSync('/bin/busybox') },
    ...['sh', 'hostname', 'httpd', 'sleep', 'timeout', 'wget'].map((applet) => ({
      name: `bin/${applet}`,
      mode: 0o777,
      linkTo: 'busybox',
    })),
    { name: 'tmp/', mode: 0o1777, directory: true },
    { name: 'www/', mode: 0o755, directory: true },
    { name: 'www/cgi-bin/', mode: 0o755, directory: true },
    { name: 'www/cgi-bin/whoami', mode: 0o755, content: whoami },
  ]);
  const configuration = JSON.stringify({
    architecture: { x64: 'amd64', arm64: 'arm64' }[process.arch as 'x64' | 'arm64'] ?? process.arch,
    os: 'linux',
    config: { Entrypoint: ['/bin/sleep'], Cmd: ['2147483647'], Env: ['PATH=/bin'] },
    rootfs: { type: 'layers', diff_ids: [`sha256:${createHash('sha256').update(layer).digest('hex')}`] },
  });
  const manifest = [{ Config: 'config.json', RepoTags: [busyboxImage], Layers: ['layer.tar'] }];
  return tar([
    { name: 'manifest.json', content: JSON.stringify(manifest) },
    { name: 'config.json', content: configuration },
    { name: 'layer.tar', content: layer },
  ]);
}
