// SPDX-License-Identifier: Apache-2.0
// From BPF sources to an object, and what of it the kernel would run.

import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { execa } from 'execa';

/** As .ci/bpf does, but for warnings: a changed condition may well be always true. False: clang refuses it. */
export async function compile(source: string, object: string): Promise<boolean> {
  const include = `-I/usr/include/${process.arch === 'x64' ? 'x86_64' : process.arch}-linux-gnu`;
  const flags = ['-target', 'bpf', '-mcpu=v2', '-O2', '-g', '-std=gnu11', '-w', '-D__TARGET_ARCH_x86', include];
  const clang = await execa('clang-14', [...flags, '-c', source, '-o', object], { reject: false });
  if (clang.failed && clang.exitCode === undefined) throw clang;
  return !clang.failed;
}

const SECTION_HEADER = 64;
const SYMBOL = 24;
const RELOCATION = 16;
const SYMBOLS = 2;
const RELOCATIONS = 9;
const FUNCTION = 2;

/**
 * Of each program, a hash of its instructions, their relocations, and the functions that it may call (ELF64, little
 * endian): equal for programs that are the same code.
 */
export function programHashes(object: string): Map<string, string> {
  const elf = readFileSync(object);
  const table = Number(elf.readBigUInt64LE(40));
  const sections = Array.from({ length: elf.readUInt16LE(60) }, (_, index) => {
    const at = table + index * SECTION_HEADER;
    const offset = Number(elf.readBigUInt64LE(at + 24));
    const bytes = elf.subarray(offset, offset + Number(elf.readBigUInt64LE(at + 32)));
    return { type: elf.readUInt32LE(at + 4), link: elf.readUInt32LE(at + 40), of: elf.readUInt32LE(at + 44), bytes };
  });
  const symbols = sections.find(({ type }) => type === SYMBOLS);
  const names = sections[symbols?.link ?? 0]?.bytes;
  if (symbols === undefined || names === undefined) throw new Error(`${object}: no symbols`);
  const nameAt = (at: number) => names.toString('latin1', at, names.indexOf(0, at));
  const all = Array.from({ length: symbols.bytes.length / SYMBOL }, (_, index) => {
    const at = index * SYMBOL;
    return {
      name: nameAt(symbols.bytes.readUInt32LE(at)),
      type: symbols.bytes.readUInt8(at + 4) & 15,
      section: symbols.bytes.readUInt16LE(at + 6),
      value: Number(symbols.bytes.readBigUInt64LE(at + 8)),
      size: Number(symbols.bytes.readBigUInt64LE(at + 16)),
    };
  });
  const functions = all.filter(({ type }) => type === FUNCTION);
  const code = ({ section, value, size }: (typeof all)[number]): string => {
    const sum = createHash('sha256');
    sum.update(sections[section]?.bytes.subarray(value, value + size) ?? '');
    for (const { type, of, bytes } of sections) {
      if (type !== RELOCATIONS || of !== section) continue;
      for (let at = 0; at < bytes.length; at += RELOCATION) {
        const where = Number(bytes.readBigUInt64LE(at));
        if (where < value || where >= value + size) continue;
        const symbol = all[bytes.readUInt32LE(at + 12)];
        sum.update(`${where - value} ${symbol?.section} ${symbol?.name} ${symbol?.value}`);
      }
    }
    return sum.digest('hex');
  };
  // Static functions are in .text, programs in sections of their own.
  const isProgram = ({ section }: (typeof all)[number]) => nameOf(elf, table, section) !== '.text';
  const shared = functions.filter((one) => !isProgram(one)).map(code);
  return new Map(functions.filter(isProgram).map((one) => [one.name, [code(one), ...shared].join()]));
}

function nameOf(elf: Buffer, table: number, section: number): string {
  const strings = table + elf.readUInt16LE(62) * SECTION_HEADER;
  const at = Number(elf.readBigUInt64LE(strings + 24)) + elf.readUInt32LE(table + section * SECTION_HEADER);
  return elf.toString('latin1', at, elf.indexOf(0, at));
}
