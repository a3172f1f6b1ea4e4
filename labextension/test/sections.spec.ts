import { SidebarSections } from '../src/sidebar/sections';

const section = (id: string, rank: number) => ({ id, rank, title: id, render: () => null });

it('sections of the sidebar are in the order of their ranks, until they are disposed of', () => {
  const sections = new SidebarSections();
  const seen: string[] = [];
  sections.changed.connect(() => seen.push(sections.items.map(({ id }) => id).join(' ')));
  sections.add(section('last', 900));
  const first = sections.add(section('first', 50));
  expect(() => sections.add(section('first', 1))).toThrow('first');
  first.dispose();
  sections.add(section('first', 1000));
  expect(seen).toEqual(['last', 'first last', 'last', 'last first']);
});
