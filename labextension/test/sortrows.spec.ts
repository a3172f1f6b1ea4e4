import { found, IColumn, sorted } from '../src/console/sortrows';

interface IRow {
  name: string;
  size: number | null;
}

const columns: IColumn<IRow>[] = [
  { id: 'name', title: 'Name', width: '1fr', value: row => row.name },
  { id: 'size', title: 'Size', width: '1fr', value: row => row.size }
];

const rows: IRow[] = [
  { name: 'gpu10', size: 3 },
  { name: 'gpu9', size: null },
  { name: 'GPU1', size: 20 }
];

const names = (some: readonly IRow[]) => some.map(row => row.name);

describe('the rows of a table', () => {
  it('are found by every word, in any column, in any case', () => {
    expect(names(found(rows, columns, ''))).toEqual(['gpu10', 'gpu9', 'GPU1']);
    expect(names(found(rows, columns, ' gpu1 '))).toEqual(['gpu10', 'GPU1']);
    expect(names(found(rows, columns, 'gpu 20'))).toEqual(['GPU1']);
    expect(found(rows, columns, 'gpu tpu')).toEqual([]);
  });

  it('do not match across columns', () => {
    expect(found([{ name: 'a', size: 1 }], columns, 'a1')).toEqual([]);
  });

  it('are sorted as people read numbers in names', () => {
    const by = { by: 'name', down: false };
    expect(names(sorted(rows, columns, by))).toEqual(['GPU1', 'gpu9', 'gpu10']);
    expect(names(sorted(rows, columns, { ...by, down: true }))).toEqual(['gpu10', 'gpu9', 'GPU1']);
  });

  it('have those without a value last, whichever way', () => {
    for (const down of [false, true]) {
      expect(names(sorted(rows, columns, { by: 'size', down })).pop()).toBe('gpu9');
    }
    expect(sorted(rows, columns, { by: 'size', down: false })[0]?.size).toBe(3);
  });

  it('stay as they are without such a column', () => {
    expect(sorted(rows, columns, { by: 'colour', down: false })).toBe(rows);
  });
});
