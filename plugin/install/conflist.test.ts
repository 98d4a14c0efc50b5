// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import { seededRandom } from '../cni/random.testing.ts';
import {
  canBePrimary,
  type Edit,
  isOwned,
  type NetworkFile,
  ownedList,
  RivalError,
  readNetworkFile,
  type Wanted,
  withEntry,
  withoutEntry,
} from './conflist.ts';

const entry = { type: 'ambient-redirect', enrollment: 'all', capabilities: { bandwidth: true } };
const wanted: Wanted = { entry };

function file(contents: string | object, name = '10-pods.conflist'): NetworkFile {
  const text = typeof contents === 'string' ? contents : JSON.stringify(contents, null, 2);
  return readNetworkFile(name, Buffer.from(text));
}

function list(...plugins: object[]): NetworkFile {
  return file({ cniVersion: '1.0.0', name: 'pods', plugins });
}

function edited(before: NetworkFile, how: Wanted = wanted): { after: NetworkFile; edit: Edit; text: string } {
  const edit = withEntry(before, how);
  if (edit === null) throw new Error('unchanged');
  return { edit, after: readNetworkFile(edit.name, edit.bytes), text: edit.bytes.toString() };
}

const types = ({ plugins }: NetworkFile) => plugins.map(({ type }) => type);

describe('what a runtime takes for a network', () => {
  test.each([
    ['no JSON', '10.conflist', '{', 'cannot decode network configuration'],
    ['a byte order mark', '10.conflist', '\uFEFF{"name":"n","plugins":[{"type":"ptp"}]}', 'byte order mark'],
    ['a list', '10.conflist', '[]', 'a JSON list, not an object'],
    ['no name', '10.conflist', '{"plugins":[{"type":"ptp"}]}', 'it has no "name"'],
    ['keys of a list in another case', '10.conflist', '{"Name":"n","plugins":[{"type":"ptp"}]}', 'it has no "name"'],
    ['no plugins', '10.conflist', '{"name":"n"}', 'it has no "plugins"'],
    ['an empty list', '10.conflist', '{"name":"n","plugins":[]}', 'it has no "plugins"'],
    ['a plugin that is no object', '10.conflist', '{"name":"n","plugins":["ptp"]}', 'plugins[0] = "ptp" is no object'],
    ['a plugin without type', '10.conflist', '{"name":"n","plugins":[{}]}', 'plugins[0] has no "type"'],
    ['cniVersion as number', '10.conflist', '{"name":"n","cniVersion":1,"plugins":[{"type":"a"}]}', 'no string'],
    ['a list in a .conf', '10.conf', '{"name":"n","plugins":[{"type":"ptp"}]}', 'it has no "type"'],
  ])('not %s', (_what, name, text, reason) => {
    expect(() => file(text, name)).toThrow(reason);
  });

  test('the type of a plugin is found whatever the case of its key', () => {
    expect(types(file('{"name":"n","plugins":[{"TYPE":"ptp"},{"Type":"a","type":"b"}]}'))).toEqual(['ptp', 'b']);
  });

  test('a lone configuration is a network of one plugin', () => {
    expect(file('{"Type":"bridge","NAME":"lone"}', '10.conf')).toMatchObject({ kind: 'single', network: 'lone' });
    expect(file('{"type":"bridge"}', '10.json')).toMatchObject({ kind: 'single', network: 'k8s-pod-network' });
  });

  test('of two "plugins" the last counts', () => {
    expect(types(file('{"name":"n","plugins":[{"type":"a"}],"plugins":[{"type":"b"}]}'))).toEqual(['b']);
  });

  test('what gives no pod its network is no primary', () => {
    const primary = (...names: string[]) => canBePrimary(list(...names.map((type) => ({ type }))));
    expect([
      primary('loopback'),
      primary('istio-cni'),
      primary('ambient-redirect'),
      primary('ptp', 'istio-cni'),
    ]).toEqual([false, false, false, true]);
  });
});

describe('the place of the entry', () => {
  test('behind all that is there', () => {
    expect(types(edited(list({ type: 'ptp' }, { type: 'portmap' })).after)).toEqual([
      'ptp',
      'portmap',
      'ambient-redirect',
    ]);
  });

  test.each([
    ['first of the chain', ['ambient-redirect', 'ptp'], ['ptp', 'ambient-redirect']],
    ['before a plugin that sets the MAC', ['ptp', 'ambient-redirect', 'tuning'], ['ptp', 'tuning', 'ambient-redirect']],
    ['before a VRF', ['bridge', 'ambient-redirect', 'vrf'], ['bridge', 'vrf', 'ambient-redirect']],
    ['twice', ['ptp', 'ambient-redirect', 'ambient-redirect'], ['ptp', 'ambient-redirect']],
    ['twice, once wrongly', ['ambient-redirect', 'ptp', 'ambient-redirect'], ['ptp', 'ambient-redirect']],
    ['three times', ['ambient-redirect', 'ptp', 'ambient-redirect', 'ambient-redirect'], ['ptp', 'ambient-redirect']],
  ])('%s: %j', (_what, before, after) => {
    const plugins = before.map((type) => (type === 'ambient-redirect' ? entry : { type }));
    expect(types(edited(list(...plugins)).after)).toEqual(after);
  });

  test.each([
    ['last', ['ptp', 'portmap', 'ambient-redirect']],
    ['an admin wants bandwidth behind us', ['ptp', 'ambient-redirect', 'bandwidth']],
    ['something unknown wants to be last', ['ptp', 'ambient-redirect', 'acme-last']],
  ])('it stays where it is: %s', (_what, before) => {
    expect(
      withEntry(list(...before.map((type) => (type === 'ambient-redirect' ? entry : { type }))), wanted),
    ).toBeNull();
  });
});

describe('settings', () => {
  test('an entry with other settings is changed where it is', () => {
    const before = list({ type: 'ptp' }, { ...entry, enrollment: 'annotation', extra: 1 }, { type: 'bandwidth' });
    const { after, edit } = edited(before);
    expect(after.plugins.map(({ fields }) => fields)).toEqual([{ type: 'ptp' }, entry, { type: 'bandwidth' }]);
    expect(edit.notes).toEqual(['changed our entry']);
  });

  test('the order of its keys, and how it is laid out, are not looked at', () => {
    const { type, ...rest } = entry;
    expect(withEntry(list({ type: 'ptp' }, { ...rest, type }), wanted)).toBeNull();
    expect(
      withEntry(file(JSON.stringify({ name: 'n', cniVersion: '0.4.0', plugins: [{ type: 'a' }, entry] })), wanted),
    ).toBeNull();
  });

  test('args of its own stay', () => {
    const own = { entry: { ...entry, args: { cni: { a: 1 } } }, replaceIstio: true };
    const { after } = edited(list({ type: 'ptp' }, { type: 'istio-cni', ambient_enabled: true }), own);
    expect(after.plugins[1]?.fields.args).toEqual({
      cni: { a: 1 },
      'ambient-redirect': { replaced: [{ at: 1, text: expect.any(String) }] },
    });
  });
});

describe('cniVersion', () => {
  const versions = (version: string | undefined, told?: string, more: object = {}) => {
    const before = file({
      ...(version !== undefined && { cniVersion: version }),
      name: 'n',
      ...more,
      plugins: [{ type: 'a' }],
    });
    const { after, edit } = edited(before, { entry, ...(told !== undefined && { cniVersion: told }) });
    const back = withoutEntry(after) as Edit;
    expect(back.bytes.toString()).toBe(before.json.text);
    return [after.cniVersion, edit.notes.length];
  };

  test.each([
    ['0.3.1', undefined, '0.3.1', 1],
    ['0.4.0', undefined, '0.4.0', 1],
    ['1.1.0', undefined, '1.1.0', 1],
    ['0.2.0', undefined, '1.0.0', 2],
    [undefined, undefined, '1.0.0', 2],
    ['1.1.0', '1.0.0', '1.0.0', 2],
    ['0.3.1', '0.3.1', '0.3.1', 1],
  ])('%s, told %s: %s, and back', (version, told, expected, notes) => {
    expect(versions(version, told)).toEqual([expected, notes]);
  });

  test('cniVersions of a newer libcni has one that we speak', () => {
    expect(versions(undefined, undefined, { cniVersions: ['0.4.0', '1.0.0'] })).toEqual([undefined, 1]);
  });
});

describe('a lone configuration', () => {
  const lone = '{\n\t"cniVersion": "0.4.0", "name": "lone",\n\t"type": "bridge",\n\t"vendor": 1.50\n}\n';

  test('is wrapped in a list of its name and version, and comes back as it was', () => {
    const { after, edit, text } = edited(file(lone, '10-lone.conf'));
    expect(edit).toMatchObject({ name: '10-lone.conflist', removes: '10-lone.conf' });
    expect(after).toMatchObject({ network: 'lone', cniVersion: '0.4.0', kind: 'list' });
    expect(types(after)).toEqual(['bridge', 'ambient-redirect']);
    expect(text).toContain(lone.trim());
    const back = withoutEntry(after) as Edit;
    expect(back).toMatchObject({ name: '10-lone.conf', removes: '10-lone.conflist' });
    expect(back.bytes.toString()).toBe(lone);
  });

  test('of .json too', () => {
    expect(edited(file('{"type":"ptp"}', '10.json')).edit).toMatchObject({ name: '10.conflist', removes: '10.json' });
  });

  test('whose list got a third plugin meanwhile stays a list', () => {
    const { after } = edited(file(lone, '10-lone.conf'));
    const grown = readNetworkFile(
      after.name,
      Buffer.from(after.json.text.replace('"plugins": [', '"plugins": [\n    { "type": "acme" },')),
    );
    const back = withoutEntry(grown) as Edit;
    expect(back).toMatchObject({ name: '10-lone.conflist' });
    expect(types(readNetworkFile(back.name, back.bytes))).toEqual(['acme', 'bridge']);
  });

  test('a name in the entry that leads elsewhere is not written to', () => {
    const { after } = edited(file(lone, '10-lone.conf'));
    const evil = readNetworkFile(after.name, Buffer.from(after.json.text.replace('"10-lone.conf"', '"../evil.conf"')));
    expect(withoutEntry(evil)).toMatchObject({ name: '10-lone.conflist' });
  });
});

describe('beside istio-cni', () => {
  const istio = { type: 'istio-cni', name: 'istio-cni', ambient_enabled: true, kubernetes: { kubeconfig: '/k' } };

  test('in ambient mode: refused', () => {
    expect(() => withEntry(list({ type: 'ptp' }, istio), wanted)).toThrow(RivalError);
    expect(() => withEntry(list({ type: 'ptp' }, istio), wanted)).toThrow(
      '10-pods.conflist has an entry of istio-cni with ambient_enabled',
    );
    const folded = list({ type: 'ptp' }, { Type: 'istio-cni', AMBIENT_ENABLED: true });
    expect(() => withEntry(folded, wanted)).toThrow(RivalError);
  });

  test.each([[{ ...istio, ambient_enabled: false }], [{ type: 'istio-cni' }]])('for sidecars only: %j', (sidecars) => {
    expect(types(edited(list({ type: 'ptp' }, sidecars)).after)).toEqual(['ptp', 'istio-cni', 'ambient-redirect']);
  });

  test('replaced where it was told to, and put back to the byte', () => {
    const before = list({ type: 'ptp' }, istio, { type: 'portmap' });
    const { after, edit } = edited(before, { entry, replaceIstio: true });
    expect(types(after)).toEqual(['ptp', 'portmap', 'ambient-redirect']);
    expect(edit.notes).toContain('took out the entry of istio-cni; uninstall puts it back');
    expect((withoutEntry(after) as Edit).bytes.toString()).toBe(before.json.text);
    // Once more changes nothing, and does not forget it.
    expect(withEntry(after, { entry, replaceIstio: true })).toBeNull();
  });

  test('it put itself back: the one of the last time counts', () => {
    const { after } = edited(list({ type: 'ptp' }, istio), { entry, replaceIstio: true });
    const plugins = after.plugins.map(({ fields }) => fields);
    const again = list(...plugins, { ...istio, log_level: 'debug' });
    const { after: third } = edited(again, { entry, replaceIstio: true });
    expect(types(third)).toEqual(['ptp', 'ambient-redirect']);
    const back = withoutEntry(third) as Edit;
    expect(readNetworkFile(back.name, back.bytes).plugins.map(({ fields }) => fields)).toEqual([
      { type: 'ptp' },
      { ...istio, log_level: 'debug' },
    ]);
  });

  test('it is there when we leave: not a second time', () => {
    const { after } = edited(list({ type: 'ptp' }, istio), { entry, replaceIstio: true });
    const again = list(...after.plugins.map(({ fields }) => fields), istio);
    const back = withoutEntry(again) as Edit;
    expect(types(readNetworkFile(back.name, back.bytes))).toEqual(['ptp', 'istio-cni']);
  });
});

describe('a list of our own', () => {
  const primary = list({ type: 'ptp' }, { type: 'portmap' });
  const own = '02-ambient-redirect.conflist';

  test('has what the primary has, and our entry', () => {
    const edit = ownedList(primary, own, wanted, undefined) as Edit;
    const made = readNetworkFile(own, edit.bytes);
    expect([types(made), isOwned(made), isOwned(primary)]).toEqual([
      ['ptp', 'portmap', 'ambient-redirect'],
      true,
      false,
    ]);
    expect(ownedList(primary, own, wanted, edit.bytes)).toBeNull();
    expect(withoutEntry(made)).toEqual({ removes: own, notes: [`removed ${own}`] });
  });

  test('follows the primary', () => {
    const first = ownedList(primary, own, wanted, undefined) as Edit;
    const second = ownedList(list({ type: 'bridge' }), own, wanted, first.bytes) as Edit;
    expect(types(readNetworkFile(own, second.bytes))).toEqual(['bridge', 'ambient-redirect']);
  });

  test('from a lone configuration', () => {
    const edit = ownedList(file('{"type":"ptp","name":"x"}', '10.conf'), own, wanted, undefined) as Edit;
    expect(types(readNetworkFile(own, edit.bytes))).toEqual(['ptp', 'ambient-redirect']);
  });
});

describe('what is not ours keeps its bytes', () => {
  test.each([
    ['one line', '{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a"}]}'],
    [
      'tabs',
      '{\n\t"cniVersion": "1.0.0",\n\t"name": "n",\n\t"plugins": [\n\t\t{ "type": "a" },\n\t\t{ "type": "b" }\n\t]\n}\n',
    ],
    ['CRLF', '{\r\n  "cniVersion": "1.0.0",\r\n  "name": "n",\r\n  "plugins": [\r\n    {"type": "a"}\r\n  ]\r\n}\r\n'],
    [
      'numbers that JavaScript cannot hold',
      '{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a","mtu":1.50,"id":12345678901234567890,"e":1E400}]}',
    ],
    ['a key twice', '{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"x","type":"a","a":1,"a":2}]}'],
    ['__proto__', '{"cniVersion":"1.0.0","name":"n","__proto__":{"a":1},"plugins":[{"type":"a","__proto__":[]}]}'],
    ['escapes', '{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a","s":"\\u0041\\/\\"]}{[ ,"}]}'],
    [
      'brackets in strings',
      '{"cniVersion":"1.0.0","name":"n","x":"\\"plugins\\": [","plugins":[{"type":"a","y":"]}"}]}',
    ],
    [
      'keys behind the plugins',
      '{"cniVersion":"1.0.0","name":"n","plugins" : [ {"type":"a"} ] , "disableCheck" : true }',
    ],
    [
      'odd white space',
      '\n\n { "cniVersion" :"1.0.0"\t, "name":"n","plugins":\n[\n\n{"type":"a"}\n\n,\n{"type":"b"} ] }',
    ],
  ])('%s', (_what, text) => {
    const before = file(text);
    const { after } = edited(before);
    expect(types(after).at(-1)).toBe('ambient-redirect');
    expect((withoutEntry(after) as Edit).bytes.toString()).toBe(text);
  });

  test('bytes that are no UTF-8, and characters beyond ASCII', () => {
    const bytes = Buffer.concat([
      Buffer.from('{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a","ключ":"€ 𝄞 \u2028","raw":"'),
      Buffer.from([0xff, 0xc3, 0x28, 0x80]),
      Buffer.from('"}]}'),
    ]);
    const edit = withEntry(readNetworkFile('10.conflist', bytes), { entry: { ...entry, note: 'ü𝄞' } }) as Edit;
    const after = readNetworkFile('10.conflist', edit.bytes);
    expect(after.plugins[1]?.fields.note).toBe('ü𝄞');
    expect((withoutEntry(after) as Edit).bytes.equals(bytes)).toBe(true);
  });

  test('the entry is laid out as what is around it', () => {
    const tabs = '{\n\t"cniVersion": "1.0.0",\n\t"name": "n",\n\t"plugins": [\n\t\t{ "type": "a" }\n\t]\n}\n';
    expect(edited(file(tabs), { entry: { type: 'ambient-redirect' } }).text).toBe(
      '{\n\t"cniVersion": "1.0.0",\n\t"name": "n",\n\t"plugins": [\n\t\t{ "type": "a" },\n\t\t{\n\t\t\t"type": "ambient-redirect"\n\t\t}\n\t]\n}\n',
    );
  });
});

/** Documents that a JSON writer of any taste could have made, with our entries and Istio's among the plugins. */
test('fuzz: whatever the list, it stays valid, ours is in it once in its place, and everything else keeps its bytes', () => {
  const rounds = process.env.AMBIENT_REDIRECT_LONG === '1' ? 20_000 : 2_000;
  for (let seed = 0; seed < rounds; seed++) {
    const random = seededRandom(seed);
    const pick = <T>(...choices: T[]): T => choices[random(choices.length)] as T;
    const gap = () => pick('', '', ' ', '\n', '\t', '\r\n  ', '\n    ');
    const string = () => JSON.stringify(pick('a', 'plugins', ']}', '"\\', 'é€𝄞', '', '__proto__', '\u2028', '{[,:'));
    const value = (depth: number): string => {
      const kind = random(depth > 3 ? 4 : 6);
      if (kind === 0) return pick('0', '-1.50', '1e5', '12345678901234567890', '0.1E-7');
      if (kind === 1) return pick('true', 'false', 'null');
      if (kind < 4) return string();
      const items = Array.from({ length: random(4) }, () => value(depth + 1));
      if (kind === 4) return `[${gap()}${items.join(`${gap()},${gap()}`)}${gap()}]`;
      return `{${gap()}${items.map((item) => `${string()}${gap()}:${gap()}${item}`).join(`${gap()},${gap()}`)}${gap()}}`;
    };
    const plugin = (type: string) => {
      const others = Array.from(
        { length: random(4) },
        () => `${JSON.stringify(`k${random(9)}`)}${gap()}:${gap()}${value(1)}`,
      );
      const ambient = type === 'istio-cni' ? [`"ambient_enabled"${gap()}:${gap()}true`] : [];
      const members = [...others, ...ambient, `${pick('"type"', '"type"', '"Type"')}${gap()}:${gap()}"${type}"`];
      return `{${gap()}${members.join(`${gap()},${gap()}`)}${gap()}}`;
    };
    const first = pick('ptp', 'bridge', 'acme');
    const rest = Array.from({ length: random(5) }, () =>
      pick('portmap', 'tuning', 'bandwidth', 'acme-last', 'ambient-redirect', 'istio-cni'),
    );
    const names = [first, ...rest];
    const plugins = names.map(plugin);
    const own = (type: string) => type === 'ambient-redirect';
    const foreign = plugins.filter((_text, i) => !own(names[i] ?? '') && names[i] !== 'istio-cni');
    const members = [
      `"cniVersion"${gap()}:${gap()}"${pick('0.3.1', '1.0.0', '1.1.0', '0.2.0')}"`,
      `"name"${gap()}:${gap()}"net"`,
      ...Array.from({ length: random(3) }, () => `${JSON.stringify(`x${random(9)}`)}${gap()}:${gap()}${value(1)}`),
    ];
    members.splice(
      random(members.length + 1),
      0,
      `"plugins"${gap()}:${gap()}[${gap()}${plugins.join(`${gap()},${gap()}`)}${gap()}]`,
    );
    const text = `${gap()}{${gap()}${members.join(`${gap()},${gap()}`)}${gap()}}${gap()}`;

    const before = readNetworkFile('10.conflist', Buffer.from(text));
    expect(types(before), `seed ${seed}`).toEqual(names);
    const edit = withEntry(before, { entry, replaceIstio: true });
    const bytes = edit?.bytes ?? Buffer.from(text);
    JSON.parse(bytes.toString());
    const after = readNetworkFile('10.conflist', bytes);
    const at = types(after).indexOf('ambient-redirect');
    expect({ seed, own: types(after).filter(own).length, others: types(after).filter((type) => !own(type)) }).toEqual({
      seed,
      own: 1,
      others: names.filter((type) => !own(type) && type !== 'istio-cni'),
    });
    expect(at > 0 && !types(after).slice(at).includes('tuning'), `seed ${seed}`).toBe(true);
    let from = 0;
    for (const plugin of foreign) {
      from = bytes.indexOf(plugin, from);
      expect(from, `seed ${seed}: ${plugin}`).toBeGreaterThanOrEqual(0);
      from += Buffer.byteLength(plugin);
    }
    expect(withEntry(after, { entry, replaceIstio: true }), `seed ${seed}`).toBeNull();

    const back = withoutEntry(after) as Edit;
    // Without entries of ours at first it comes back whole, Istio's too.
    if (!names.some(own)) expect(back.bytes.toString(), `seed ${seed}`).toBe(text);
    expect(types(readNetworkFile('10.conflist', back.bytes)), `seed ${seed}`).toEqual(
      names.filter((type) => !own(type)),
    );
  }
});
